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
        """What a class imports in its body are methods of it, as if they were written there."""
        for cls in list(_classes(pkg)):
            for name in [name for name, member in cls.members.items() if member.is_alias]:
                target = cls.imports.pop(name)
                cls.set_member(name, griffe.Alias(name, target))


def _classes(module: griffe.Module):  # noqa: ANN202
    for member in module.members.values():
        if isinstance(member, griffe.Class):
            yield member
        elif isinstance(member, griffe.Module):
            yield from _classes(member)
