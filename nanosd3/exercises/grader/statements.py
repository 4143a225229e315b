"""Which statements of a notebook an answer needs."""

import ast
import builtins
import symtable
from collections.abc import Iterator
from dataclasses import dataclass

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


@dataclass(frozen=True, eq=False)
class Statement:
    """A top-level statement of a notebook that binds global names or changes their objects."""

    node: ast.stmt
    cell: int
    line: int  # the first in its cell, counted from 1
    text: list[str]  # its lines
    binds: frozenset[str]
    changes: frozenset[str]
    needs: frozenset[str]  # global names

    @property
    def place(self) -> tuple[int, int, int]:
        return self.cell, self.line, self.node.col_offset

    @property
    def is_function(self) -> bool:
        """Whether it needs most of its names only later, when it is called."""
        return isinstance(self.node, FUNCTIONS) or isinstance(
            getattr(self.node, "value", None), ast.Lambda
        )

    @property
    def is_import(self) -> bool:
        return isinstance(self.node, ast.Import | ast.ImportFrom)

    @property
    def modules(self) -> set[str]:
        """The top-level modules that it imports when it is run."""
        inner = outside_functions(self.node)
        names = [a.name for node in inner if isinstance(node, ast.Import) for a in node.names]
        names += [node.module or "" for node in inner if isinstance(node, ast.ImportFrom)]
        return {name.split(".")[0] for name in names}


def bindings(tree: ast.Module, lines: list[str], cell: int) -> Iterator[Statement]:
    """The statements of a cell that an answer may need."""
    for node in tree.body:
        table = symtable.symtable(ast.unparse(node), "cell", "exec")
        symbols = table.get_symbols()
        binds = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            binds = {"*"}
        changes = changed_names(node)
        needs = global_names(table) | (changes & binds)
        if isinstance(node, ast.AugAssign):
            binds -= changes
        if binds or changes:
            decorators = getattr(node, "decorator_list", [])
            line = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            text = lines[line - 1 : node.end_lineno]
            kinds = map(frozenset, (binds, changes, needs))
            yield Statement(node, cell, line, text, *kinds)


def outside_functions(node: ast.AST) -> list[ast.AST]:
    """A node and all within it but for what is in functions and classes."""
    found = [node]
    for inner in found:  # grows
        if not isinstance(inner, FUNCTIONS):
            found += ast.iter_child_nodes(inner)
    return found


def changed_names(node: ast.stmt) -> set[str]:
    """Names whose objects a statement changes: x += 1, x[0] = 1, x.y = 1, x.append(1)."""
    found = set()
    for inner in outside_functions(node):
        target: ast.AST | None = None
        if isinstance(inner, ast.AugAssign):
            target = inner.target
        elif isinstance(inner, ast.Subscript | ast.Attribute):
            target = inner if isinstance(inner.ctx, ast.Store | ast.Del) else None
        elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
            method = inner.value.func
            target = method if isinstance(method, ast.Attribute) else None
        while isinstance(target, ast.Subscript | ast.Attribute):
            target = target.value
        if isinstance(target, ast.Name):
            found.add(target.id)
    return found


def global_names(table: symtable.SymbolTable) -> set[str]:
    """The global names that a piece of code reads."""
    top = table.get_type() == "module"
    found = {
        s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())
    }
    return found.union(*map(global_names, table.get_children()))


def with_needs(answer: Statement, statements: list[Statement]) -> list[Statement]:
    """An answer and all statements that it needs."""
    found = [answer]
    for statement in found:  # grows
        for name in sorted(statement.needs):
            for provider in providers(name, statement, statements):
                if provider not in found:
                    found.append(provider)
    return found


def providers(name: str, user: Statement, statements: list[Statement]) -> list[Statement]:
    """What gives a statement a global name, as when the notebook is run: the last statement before
    it that binds the name, for a function the last in its cell, too, or else the first after it;
    and whatever changes that object in between."""
    star = set() if hasattr(builtins, name) else {"*"}
    bound = [s for s in statements if s.binds & {name, *star} and s is not user]
    before = [s for s in bound if s.place < user.place]
    in_time = [s for s in bound if s.cell <= user.cell] if user.is_function else []
    found = [*before[-1:], *in_time[-1:]] or bound[:1]
    if not found or found[-1].is_import:
        return found
    changing = [s for s in statements if name in s.changes and s.place > found[0].place]
    if user.is_function:
        return found + [s for s in changing if s.cell <= user.cell and s is not user]
    return found + [s for s in changing if s.place < user.place]


def why_not_run(closure: list[Statement], open_book: bool) -> str | None:
    """Why an answer cannot be run outside its notebook; None if it can."""
    for statement in closure:
        names = ", ".join(sorted(statement.binds))
        if "nanosd3" in statement.modules and not open_book:
            return f"closed book: the answer uses {names}, imported from the package nanosd3"
        if "lab" in statement.modules:
            return f"the answer uses {names} from lab.py, which grading does not have"
    return None
