"""Under JAX's transformations and their compositions, with and without a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import distattn
from tests.cases import CASES, Case, as_float32, check, mesh_of, shardings
from tests.tolerance import assert_close

CASE = Case(queries=8, keys=16, options=(("is_causal", True),))


def arrays(case=CASE):
    arguments = as_float32(case.arguments())
    return tuple(arguments[name] for name in ("query", "key", "value"))


def attention(mesh, implementation=None, strategy="butterfly"):
    where = (
        {"key_value_sharding": P(None, ())}
        if mesh is None
        else {**shardings(mesh, "kv", query="auto"), "strategy": strategy}
    )
    return functools.partial(
        distattn.dot_product_attention, is_causal=True, implementation=implementation, **where
    )


def loss_of(f):
    return lambda *x: (f(*x) ** 2).sum()


def grads_of(f):
    return jax.grad(loss_of(f), argnums=(0, 1, 2))


def close(got, want, what):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Both sides are float32 results: each may be off by the tolerance.
        assert_close(x, y, jnp.float32, CASE.keys * CASE.queries, 2.0, what=what)


@pytest.fixture(params=[None, "auto", "explicit"])
def mesh(request):
    if request.param is None:
        yield None
        return
    mesh = mesh_of(4, request.param)
    with jax.set_mesh(mesh):
        yield mesh


dense = jax.jit(attention(None, "dense"))
dense_grads = jax.jit(grads_of(attention(None, "dense")))


def exact():
    return dense_grads(*arrays())


def test_grad_of_jit_and_jit_of_grad(mesh):
    f = attention(mesh)
    close(jax.jit(grads_of(f))(*arrays()), exact(), "jit of grad")
    close(grads_of(jax.jit(f))(*arrays()), exact(), "grad of jit")


def test_vmap_and_its_gradient(mesh):
    f = attention(mesh)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x[::-1]]), arrays())
    got = jax.jit(jax.vmap(f))(*stacked)
    grads = jax.jit(jax.vmap(grads_of(f)))(*stacked)
    for i in range(3):
        one = [x[i] for x in stacked]
        close(got[i], dense(*one), "vmap")
        close([g[i] for g in grads], dense_grads(*one), "vmap of grad")


def test_vmap_over_the_query_alone(mesh):
    query, key, value = arrays()
    queries = jnp.stack([query, -query])
    got = jax.jit(jax.vmap(attention(mesh), in_axes=(0, None, None)))(queries, key, value)
    for x, y in zip(got, queries, strict=True):
        close(x, dense(y, key, value), "vmap over queries")


def test_scan_over_layers_with_remat(mesh):
    query, key, value = arrays()

    def model(f, query, key, value):
        def layer(x, scale):
            return x + f(x * scale, key, value), None

        scales = jnp.array([0.5, 1.0, 1.5])
        x, _ = jax.lax.scan(jax.checkpoint(layer), query, scales)
        return x

    got, want = (
        jax.jit(grads_of(functools.partial(model, f)))(query, key, value)
        for f in (attention(mesh), attention(None, "dense"))
    )
    close(got, want, "grad of scan of checkpoint")


NAMES = ("distattn_out", "distattn_lse")
POLICIES = {
    "saved": jax.checkpoint_policies.save_only_these_names(*NAMES),
    "offloaded": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@pytest.mark.parametrize(
    ("strategy", "policy", "kind"),
    [
        # Offloaded in a scan on an Explicit mesh, the partitioner of JAX 0.9.2 fails of itself.
        ("ring", "offloaded", "auto"),
        ("ring", "saved", "explicit"),
        ("ulysses", "offloaded", "auto"),
        ("gather_kv", "saved", "explicit"),
    ],
)
def test_a_sharded_query_under_everything_at_once(strategy, policy, kind):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), arrays())

    def model(f, *x):
        @functools.partial(jax.checkpoint, policy=POLICIES[policy])
        def layer(query, scale):
            return query + jax.vmap(f)(query * scale, *x[1:]), None

        return jax.lax.scan(layer, x[0], jnp.array([0.5, 1.0]))[0]

    def gradient_on(f):
        return jax.jit(grads_of(functools.partial(model, f)))

    want = gradient_on(attention(None, "dense"))(*stacked)
    mesh = mesh_of(4, kind)
    with jax.set_mesh(mesh):
        run = gradient_on(attention(mesh, strategy=strategy))
        close(run(*stacked), want, f"{strategy} {policy} {kind}")
        if policy == "offloaded":
            assert "<host>" in str(jax.make_jaxpr(run)(*stacked))


def test_vjp_gives_the_value_of_the_call(mesh):
    f = jax.jit(attention(mesh))
    value, _ = jax.vjp(f, *arrays())
    np.testing.assert_array_equal(value, f(*arrays()))


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("butterfly", "auto"),
        ("butterfly", "explicit"),
        ("reduce_scatter", "explicit"),
        ("ring", "auto"),
        ("ulysses", "explicit"),
    ],
)
def test_dense_has_forward_mode_and_hessians(strategy, kind):
    mesh = mesh_of(4, kind)
    with jax.set_mesh(mesh):
        got = second_order(attention(mesh, "dense", strategy))
    close(got, second_order_of_dense(), f"jvp and hessian of {strategy}")


def second_order(f):
    """The derivative along a direction, and that of the gradient: a product with the hessian."""
    primals = arrays()
    tangents = jax.tree.map(jnp.cos, primals)
    run = jax.jit(lambda p, t: (jax.jvp(f, p, t), jax.jvp(grads_of(f), p, t)[1]))
    return run(primals, tangents)


@functools.cache
def second_order_of_dense():
    return second_order(attention(None, "dense"))


def test_dense_against_jax_nn_to_second_order():
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    close(second_order_of_dense(), second_order(theirs), "jvp and hessian")


@pytest.mark.parametrize("forward", [jax.jacfwd, jax.hessian])
def test_forward_mode_of_blocked_names_the_implementation_to_pass(forward):
    with pytest.raises(NotImplementedError, match="forward mode.*implementation='dense'"):
        forward(loss_of(attention(None)))(*arrays())


def test_forward_mode_inside_jit_is_refused():
    run = jax.jit(lambda *x: jax.jvp(attention(None), x, x)[1])
    with pytest.raises(
        TypeError, match="custom_vjp"
    ):  # JAX's own words: it is found after our call
        run(*arrays())


def test_a_second_derivative_names_the_implementation_to_pass():
    with pytest.raises(NotImplementedError, match="implementation='dense'"):
        jax.grad(lambda *x: grads_of(attention(None))(*x)[0].sum())(*arrays())


def test_float64_states_under_x64():
    with jax.enable_x64(True):
        check(
            CASES["everything"],
            functools.partial(distattn.dot_product_attention, return_residual=True),
            dtype=jnp.float64,
            what="float64",
        )


@pytest.mark.parametrize("strategy", ["butterfly", "ring"])
def test_float64_on_a_mesh(strategy):
    mesh = mesh_of(4, "auto")
    with jax.enable_x64(True):
        check(
            CASES["everything"],
            functools.partial(
                distattn.dot_product_attention,
                return_residual=True,
                **shardings(mesh, "kv", query="auto"),
                strategy=strategy,
            ),
            dtype=jnp.float64,
            what=f"float64 on a mesh, {strategy}",
        )


def test_the_states_are_pytrees_under_transformations():
    query, key, value = arrays()

    def run(query, key, value):
        first = distattn.partial_attention(query, key[:, :8], value[:, :8])
        second = distattn.partial_attention(query, key[:, 8:], value[:, 8:])
        state, _ = jax.lax.scan(
            lambda state, part: (distattn.merge(state, part), None),
            distattn.identity(first),
            jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second),
        )
        return distattn.finalize(state)[0]

    want = functools.partial(jax.nn.dot_product_attention)
    close(run(query, key, value), want(query, key, value), "scan of merge")
    close(
        jax.jit(grads_of(run))(query, key, value), grads_of(want)(query, key, value), "its gradient"
    )
