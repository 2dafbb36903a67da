"""`distattn plan` as a user meets it: what is asked, what is said in which order, and the exit codes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distattn.cli import main
from distattn.cli.arguments import amount_at_least
from distattn.planning.cost import Workload
from distattn.planning.plan import plan
from distattn.planning.pods import pod

LLAMA = Workload(1, 1, 33_000_000, 32, 8, 128, 128, itemsize=2, causal=True, layers=80)
POD = ["plan", "--topology", "v5p:16x16x16", "--context", "33000000", "--heads", "32"]
MODEL = [*POD, "--kv-heads", "8", "--head-dim", "128", "--layers", "80", "--dtype", "bf16"]


def test_the_command_prints_a_table(capsys):
    assert main(MODEL) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "  topology  v5p:16x16x16: 4096 devices\n" in out
    assert "  mesh      x=16, y=16, z=16 (default); keys over x, y and z\n" in out
    assert "verdict: it fits: 2.46 GiB of 95 GiB a device" in out
    assert 'strategy="butterfly", the least time: 4.81 ms a step' in out
    assert "12 one after another in the forward pass of a layer, along z, then y, then x" in out
    taken = (
        r"^  butterfly +4\.8\d ms +2\.46 GiB +15\.2 MiB +12 +1,275,064,320  taken: the least time$"
    )
    assert re.search(taken, out, re.M)
    assert re.search(r"^  psum .* 96 .* 1\.04 times as long$", out, re.M)
    titles = [line.split()[0] for line in out.splitlines() if line[:1].strip()]
    assert titles == ["inputs", "verdict:", "memory", "time", "messages", "all"]


def test_the_command_prints_json_and_nothing_else(capsys):
    assert main([*MODEL, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found == json.loads(json.dumps(plan(LLAMA, pod("v5p:16x16x16")).as_json()))
    assert found["workload"]["causal"]
    assert found["axis_order"] == ["z", "y", "x"]
    assert {"devices", "strategy", "predicted_s", "bytes_per_device", "alternatives"} <= set(found)
    assert found["devices"] == 4096
    assert [x["strategy"] for x in found["alternatives"]] == ["psum", "all_gather"]


def test_the_command_starts_no_device():
    program = "import sys; from distattn.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *MODEL, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "no-such-platform"},  # which a start would not survive
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["devices"] == 4096


def test_the_command_trains_with_as_many_queries_as_keys(capsys):
    arguments = [*POD[:4], "1048576", *POD[5:], "--training", "--strategy", "ring", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["strategy"] == "ring"
    assert found["query_sharded"]


def test_the_command_takes_what_check_measured(tmp_path, capsys):
    axes = {"host": {"latency_s": 0.5, "bytes_per_s": 1e6}}
    file = tmp_path / "check.json"
    file.write_text(json.dumps({"platform": "cpu", "processes": 4, "devices": 4, "axes": axes}))
    decode = ["plan", "--context", "4096", "--heads", "8", "--json", "--check", str(file)]
    assert main([*decode, "--topology", "cpu:4x1"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_s"] > 2 * 0.5
    assert main([*decode, "--topology", "cpu:8"]) == 2
    assert "measured on cpu in several processes" in capsys.readouterr().err
    assert main([*decode, "--topology", "cpu:4x2"]) == 2
    assert "['device'] are not measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v9:4x4"], "topology is 'v9:4x4'"),
        (["--kv-heads", "5"], "num_heads is 32 and num_kv_heads is 5"),
        (["--strategy", "ring"], "strategy is 'ring'; for 1 queries"),
        (["--mesh", "a=5"], "mesh is {'a': 5}"),
        (["--check", "no-such-file"], "--check no-such-file: No such file"),
        (["--batch-axis", "data"], "batch_axes is ('data',), and 'data' is no axis"),
        (
            ["--heads-axis", "x,y"],
            "heads_axes is ('x', 'y'), 256 devices, which must divide the 32 heads",
        ),
        (
            ["--reserved-bytes", "95G"],
            "reserved_bytes is 102005473280 and a device of v5p:16x16x16",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert main([*POD, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("distattn: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--context", "0"],
        ["--context", "12q"],
        ["--context", "1.0001k"],
        ["--queries", "-1k"],
        ["--reserved-bytes", "1,2"],
        ["--batch-axis", "a=2"],
        ["--dtype", "int3"],
        ["--strategy", "star"],
        ["--mesh", "a"],
    ],
)
def test_arguments_that_do_not_parse_are_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([*POD, *arguments])
    assert leaving.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("33000000", 33_000_000),
        ("1_000_000", 10**6),
        ("1,275,064,320", 1_275_064_320),  # as the plan writes it
        ("128k", 131_072),
        ("128K", 131_072),
        ("128Ki", 131_072),
        ("1M", 1 << 20),
        ("1mi", 1 << 20),
        ("1.5M", 1_572_864),
        ("0.5k", 512),
        ("2G", 2 << 30),
        ("1T", 1 << 40),
    ],
)
def test_lengths_may_have_a_suffix(text, number):
    assert amount_at_least(1)(text) == number


def test_a_length_is_printed_in_full(capsys):
    assert main([*POD[:4], "1M", *POD[5:], "--queries", "2k"]) == 0
    out = capsys.readouterr().out
    assert "  context   1,048,576 keys of each sequence\n" in out
    assert "  queries   2,048 of each, not sharded\n" in out
    with pytest.raises(SystemExit):
        main([*POD[:4], "1Q", *POD[5:]])
    assert "--context: '1Q' is not a whole number of at least 1; with k," in capsys.readouterr().err


def inputs(capsys, *arguments):
    """The first block of what the command prints, by name."""
    main(["plan", *arguments])
    block = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert block[0] == "inputs"
    return {line[2:12].strip(): line[12:] for line in block[1:]}


def test_every_input_is_printed_and_defaults_are_marked(capsys):
    least = inputs(capsys, "--topology", "v5e:4x4", "--context", "128k", "--heads", "64")
    assert least == {
        "topology": "v5e:4x4: 16 devices",
        "mesh": "x=4, y=4 (default); keys over x and y",
        "context": "131,072 keys of each sequence",
        "queries": "1 of each (default: decoding), not sharded",
        "batch": "1 sequence (default)",
        "heads": "64 of queries, 64 of keys and values (default: as queries)",
        "head dim": "128 (default)",
        "layers": "1 (default)",
        "dtype": "bf16 (default), 2 bytes a number",
        "training": "no (default)",
        "causal": "yes (default), which changes nothing for so few queries",
        "links": "by data sheet (default), not measured: see --check",
        "flops": "50 % of the data sheet's peak, assumed and not measured",
        "reserved": "0 B a device (default), for weights and all else",
    }
    model = ["--batch", "8", "--heads", "64", "--kv-heads", "2", "--head-dim", "128"]
    more = [*model, "--value-dim", "64", "--layers", "1", "--dtype", "f32", "--training"]
    mesh = ["--mesh", "a=2,b=2,c=4", "--batch-axis", "a,b", "--heads-axis", "c"]
    full = inputs(
        capsys,
        *("--topology", "v5e:4x4", "--context", "16k", *more, *mesh),
        *("--no-causal", "--reserved-bytes", "1G"),
    )
    assert full == {
        "topology": "v5e:4x4: 16 devices",
        "mesh": "a=2, b=2, c=4; sequences over a and b, heads over c",
        "context": "16,384 keys of each sequence",
        "queries": "16,384 of each (default: as keys), not sharded",
        "batch": "8 sequences",
        "heads": "64 of queries, 2 of keys and values, repeated to 4",
        "head dim": "128, values 64",
        "layers": "1",
        "dtype": "f32, 4 bytes a number",
        "training": "yes",
        "causal": "no: each query attends to all keys",
        "links": "by data sheet (default), not measured: see --check",
        "flops": "50 % of the data sheet's peak, assumed and not measured",
        "reserved": "1 GiB a device, for weights and all else",
    }


@pytest.mark.parametrize(
    ("topology", "says"),
    [("h100:2x8", "40 % of the data sheet's peak"), ("cpu:8", "1.75e+11 a second")],
)
def test_how_fast_products_are_counted_on_to_be(topology, says, capsys):
    found = inputs(capsys, "--topology", topology, "--context", "16k", "--heads", "8")
    assert found["flops"].startswith(says)


def test_a_causal_prompt_says_what_share_of_the_pairs_it_is(capsys):
    prompt = ["--topology", "v5e:4x4", "--context", "16k", "--heads", "8", "--queries"]
    assert inputs(capsys, *prompt, "16k", "--causal")["causal"].startswith("yes: 50 % of all pairs")
    assert inputs(capsys, *prompt, "8k")["causal"].startswith("yes (default): 75 % of all pairs")
    json_of = {}
    for causal in ("--causal", "--no-causal"):
        main(["plan", *prompt, "16k", causal, "--json"])
        json_of[causal] = json.loads(capsys.readouterr().out)
    ratio = (
        json_of["--causal"]["breakdown"]["local_s"] / json_of["--no-causal"]["breakdown"]["local_s"]
    )
    assert ratio == pytest.approx(1 / 2, abs=1e-3)


def test_what_does_not_fit_is_said_first_and_the_exit_code_is_1(capsys):
    large = [*MODEL[:2], "v5e:2x2", *MODEL[3:], "--batch", "2"]
    assert main(large) == 1
    out, err = capsys.readouterr()
    assert err == ""
    verdict = out.split("\n\n")[1].splitlines()
    assert verdict[0] == "verdict: IT DOES NOT FIT: a device needs 4.92 TiB, and there are 14.9 GiB"
    assert verdict[1] == '  that is with strategy="butterfly", which needs least'
    assert "    a context of at most 97,652, the largest that fits" in verdict
    assert any("times as many devices" in line for line in verdict)
    assert any("a KVCache of dtype int8" in line for line in verdict)
    assert "taken" not in out
    assert out.count("does not fit") == 3
    assert ", if it did fit" in out
    assert main([*large, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert [f"    {x}" for x in found["remedies"]] == verdict[3:]


def test_a_named_combine_that_does_not_fit_names_those_that_do(capsys):
    context = ["--context", "1,275,000,000"]
    assert main([*MODEL[:3], *context, *MODEL[5:], "--strategy", "all_gather"]) == 1
    out = capsys.readouterr().out
    assert '  that is with strategy="all_gather"\n' in out
    assert "    another strategy, for these fit: butterfly, psum\n" in out
    assert "taken" not in out
    assert "fits; not named" in out


def test_what_a_step_is_and_what_is_not_in_it_is_said(capsys):
    assert main([*POD, "--layers", "80", "--training", "--batch", "1"]) in (0, 1)
    out = capsys.readouterr().out
    assert "time of a step, forward and backward through the attention of 80 layers" in out
    assert "  not counted      weights, and what is not attention: see --reserved-bytes" in out
    assert "what the backward pass needs, and gradients" in out
    # Each device of one process reads all of its keys once, in every strategy alike.
    assert main(["plan", "--topology", "cpu:8", "--context", "64k", "--heads", "8"]) == 0
    out = capsys.readouterr().out
    assert "verdict: not known: a device needs 32 MiB" in out
    assert re.search(r"butterfly .* not known  1\.06 times as long$", out, re.M)


def test_axes_of_batch_and_heads_in_the_command(capsys):
    split = [
        "--mesh",
        "dp=16,tp=16,sp=16",
        "--batch-axis",
        "dp",
        "--heads-axis",
        "tp",
        "--batch",
        "16",
    ]
    assert main([*MODEL, *split, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    same = plan(
        dataclasses.replace(LLAMA, batch=16),
        "v5p:16x16x16",
        mesh={"dp": 16, "tp": 16, "sp": 16},
        batch_axes="dp",
        heads_axes="tp",
    )
    assert found == json.loads(json.dumps(same.as_json()))
    assert found["axis_order"] == ["sp"]


PAGE = (Path(__file__).parent.parent.parent / "docs" / "pages" / "pods.md").read_text(
    encoding="utf-8"
)
COMMANDS = re.findall(r"^```console\n\$ distattn (plan .*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("command", "text"), COMMANDS)
def test_the_page_on_pods_prints_what_the_command_prints(command, text, capsys):
    main([x for x in command.split() if x != "--compile"])
    out = capsys.readouterr().out
    planned, *_ = text.partition("\none layer, compiled")
    position = 0
    for part in re.split(r"^\.\.\.\n", planned, flags=re.MULTILINE):
        assert part in out[position:]
        position = out.index(part, position) + len(part)


def test_the_page_has_plans():
    assert len(COMMANDS) == 2
    assert "--compile" in COMMANDS[0][0]
