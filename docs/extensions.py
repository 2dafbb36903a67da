"""An extension of Griffe for the API reference, which parses the files and imports nothing."""

import ast

import griffe


class FieldComments(griffe.Extension):
    """Take the comment behind a field as its docstring."""

    def on_attribute_instance(
        self, *, attr: griffe.Attribute, node: ast.AST | griffe.ObjectNode, **_: object
    ) -> None:
        """Give the field `sum: jax.Array  # f32[B, T, N]` its comment as a docstring."""
        inside_class = attr.parent is not None and attr.parent.is_class
        if not inside_class or attr.has_docstring or not isinstance(node, ast.AnnAssign):
            return
        lines = attr.module.lines_collection[attr.filepath][node.lineno - 1 : node.end_lineno]
        comments = [line.partition("  # ")[2].strip() for line in lines if "  # " in line]
        if comments:
            attr.docstring = griffe.Docstring(" ".join(comments), parent=attr)
