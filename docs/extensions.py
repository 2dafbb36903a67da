"""What the API reference reads besides docstrings: Griffe parses the files, nothing is imported."""

import ast

import griffe


class AsWritten(griffe.Extension):
    """Fields are described by the comments behind them, and methods may stand in other files."""

    def on_attribute_instance(
        self, *, attr: griffe.Attribute, node: ast.AST | griffe.ObjectNode, **_: object
    ) -> None:
        """The field `sum: jax.Array  # f32[B, T, N]` has its comment as a docstring."""
        inside_class = attr.parent is not None and attr.parent.is_class
        if not inside_class or attr.has_docstring or not isinstance(node, ast.AnnAssign):
            return
        lines = attr.module.lines_collection[attr.filepath][node.lineno - 1 : node.end_lineno]
        comments = [line.partition("  # ")[2].strip() for line in lines if "  # " in line]
        if comments:
            attr.docstring = griffe.Docstring(" ".join(comments), parent=attr)

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """`append = writing.append` in a class is the function, where that is one of the package's."""
        for cls in list(_classes(pkg)):
            for name, member in list(cls.members.items()):
                if not isinstance(member, griffe.Attribute) or member.value is None:
                    continue
                inner = str(member.value).removeprefix("classmethod(").removesuffix(")")
                target = cls.module.resolve(inner.split(".")[0]) if _is_dotted(inner) else ""
                if target.startswith(f"{pkg.path}."):
                    path = ".".join([target, *inner.split(".")[1:]])
                    cls.set_member(name, griffe.Alias(name, path))


def _classes(module: griffe.Module):  # noqa: ANN202
    for member in module.members.values():
        if isinstance(member, griffe.Class):
            yield member
        elif isinstance(member, griffe.Module):
            yield from _classes(member)


def _is_dotted(text: str) -> bool:
    parts = text.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)
