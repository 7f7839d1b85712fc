"""
The reading budget: `make style` prints how dense each file is and fails where one is over a limit.

    python tools/style.py                   # everything
    python tools/style.py model.py fp4      # only these files and folders

A line budget made code move sideways, so this one counts what a reader has to take in: columns,
statements a line, names a function, and tokens a line of code. Lines are printed and never fail.
"""
import ast
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # python3 tools/style.py has to find data and tools, too

from data.files import check
from tools import cli

COLUMNS = 100
FORMULA_COLUMNS = 88                    # def f(x): return formula
FUNCTION_LINES = 40                     # without the docstring
FUNCTION_NAMES = 15                     # arguments and local variables
LONG_LINES = 90
LONG_FUNCTIONS = {("quartet.py", "train_steps")}    # the training loop; any number of names
DENSITY = 13                            # tokens a code line, over a file
FORMULA_DENSITY = 15
FORMULA_FILES = {"fp4/reference.py", "fp4/emulate/baselines.py"}
READING_PATH = ["quartet.py", "model.py", "fp4/linear.py", "fp4/reference.py"]
READING_PATH_TOKENS = 8500
README_LINES = 180

PYTHON = (".py",)
CPP = (".cu", ".cuh", ".cpp", ".h")
PROSE = (".md", "Makefile", ".ci/run")
EVERYTHING = ["quartet.py", "model.py", "fp4", "data", "tools", "tests", "Makefile", "README.md",
              ".ci"]
GENERATED = {"build", "__pycache__", "downloads"}


def parse(argv):
    parser = cli.Parser("python tools/style.py", __doc__)
    parser.add_argument("paths", nargs="*", help="files and folders; default: everything")
    return parser.parse_args(argv)


def main(argv):
    arguments = parse(argv).paths
    violations = []
    tokens_of = {}
    print(f"{'lines':>6} {'tokens':>7} {'a line':>7}")
    for path in find_files(arguments or EVERYTHING):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text()
        found, tokens, code_lines = check_file(name, text)
        violations += [f"{name}{place}: {message}" for place, message in found]
        tokens_of[name] = tokens
        if code_lines:
            lines = text.count("\n")
            print(f"{lines:6d} {tokens:7d} {tokens / code_lines:7.1f}  {name}")

    if not arguments:
        path_tokens = sum(tokens_of[name] for name in READING_PATH)
        print(f"reading path {' -> '.join(READING_PATH)}: "
              f"{path_tokens} tokens, at most {READING_PATH_TOKENS}")
        if path_tokens > READING_PATH_TOKENS:
            excess = path_tokens - READING_PATH_TOKENS
            violations.append(f"the reading path is {excess} tokens over")
    for violation in violations:
        print(violation)
    print(f"style: {len(violations)} over a limit")
    return 1 if violations else 0


def find_files(names):
    for name in names:
        path = (ROOT / name).resolve()
        check(path.exists() and path.is_relative_to(ROOT), f"there is no {name} in this tree")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in inside:
            relative = file.relative_to(ROOT)
            # A reader's answer to an exercise is not ours to judge.
            skipped = GENERATED.intersection(relative.parts) or file.match("lessons/exercise_*.cu")
            if file.is_file() and not skipped and str(relative).endswith(PYTHON + CPP + PROSE):
                yield file


def check_file(name, text):
    """-> [(":line", message)], tokens, lines that hold code"""
    found = list(check_columns(name, text))
    if name == "README.md" and text.count("\n") > README_LINES:
        excess = text.count("\n") - README_LINES
        found.append(("", f"{excess} lines over {README_LINES}"))
    is_test = name.startswith("tests/")
    if name.endswith(PYTHON):
        tokens, code_lines = count_python(text)
        found += check_python(name, text, is_test)
    elif name.endswith(CPP):
        tokens, code_lines = count_cpp(text)
        found += check_cpp(text, is_test)
    else:
        return found, 0, 0
    limit = FORMULA_DENSITY if name in FORMULA_FILES else DENSITY
    density = tokens / max(1, code_lines)
    if density > limit and not is_test:
        found.append(("", f"{density:.1f} tokens a code line, {density - limit:.1f} over {limit}"))
    return found, tokens, code_lines


def check_columns(name, text):
    for number, line in enumerate(text.splitlines(), 1):
        may_be_wide = name.endswith(".md") and (line.lstrip().startswith("|") or "](" in line
                                                or "://" in line)
        if len(line) > COLUMNS and not may_be_wide:
            yield f":{number}", f"{len(line)} columns, {len(line) - COLUMNS} over {COLUMNS}"


# ---- Python

LAYOUT = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING")


def count_python(text):
    """tokens without layout, comments and docstrings; and the lines on which they begin"""
    docstrings = {node.lineno for node in docstring_nodes(ast.parse(text))}
    count = 0
    code_lines = set()
    f_strings = 0                       # how many the token lies in
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        # From Python 3.12 on an f-string has tokens inside; before, it was one, as it is here.
        f_strings -= kind == "FSTRING_END"
        in_docstring = kind == "STRING" and token.start[0] in docstrings
        if kind not in LAYOUT and kind != "FSTRING_END" and not in_docstring and f_strings == 0:
            count += 1
            code_lines.add(token.start[0])
        f_strings += kind == "FSTRING_START"
    return count, len(code_lines)


def docstring_nodes(tree):
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and is_docstring(body[0]):
            yield body[0]


def is_docstring(node):
    value = getattr(node, "value", None)
    is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return isinstance(node, ast.Expr) and is_text


def check_python(name, text, is_test):
    tree = ast.parse(text)
    yield from check_statements(tree, text)
    for node in ast.walk(tree):
        if is_test:
            continue
        if isinstance(node, ast.IfExp) and any(isinstance(inner, ast.IfExp)
                                               for inner in ast.walk(node) if inner is not node):
            yield f":{node.lineno}", "a conditional expression inside another"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from check_function(name, node)


def check_statements(tree, text):
    """more than one statement on a line, and expressions that stand in for statements"""
    lines = text.splitlines()
    first_on_line = {}
    docstrings = {id(node) for node in docstring_nodes(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or id(node) in docstrings:
            continue
        place = f":{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(
                node.value, (ast.Tuple, ast.BoolOp, ast.IfExp, ast.ListComp)):
            yield place, "an expression whose value is not used stands in for statements"
        other = first_on_line.setdefault(node.lineno, node)
        if other is not node and not is_formula(other, node, lines[node.lineno - 1]):
            yield place, "two statements on a line"
    for number, line in enumerate(lines, 1):
        if re.match(r"\s*(else|try|finally|except\b[^:]*):\s*[^\s#]", line):
            if number in first_on_line:
                yield f":{number}", "two statements on a line"


def is_formula(function, body, line):
    """def f(x): return formula"""
    return (isinstance(function, ast.FunctionDef) and isinstance(body, ast.Return)
            and function.body == [body] and len(line) <= FORMULA_COLUMNS)


def check_function(name, function):
    lines = function.end_lineno - function.lineno + 1
    if is_docstring(function.body[0]):
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    is_long = (name, function.name) in LONG_FUNCTIONS
    limit = LONG_LINES if is_long else FUNCTION_LINES
    place = f":{function.lineno}"
    if lines > limit:
        yield place, f"{function.name} has {lines} lines, {lines - limit} over {limit}"
    names = local_names(function)
    if len(names) > FUNCTION_NAMES and not is_long:
        yield place, (f"{function.name} has {len(names)} names, {len(names) - FUNCTION_NAMES} over "
                      f"{FUNCTION_NAMES}: {', '.join(sorted(names))}")


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def local_names(function):
    """Arguments and assigned names; not those of functions inside and of comprehensions."""
    a = function.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    names = {argument.arg for argument in arguments if argument}
    todo = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        if isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        todo += ast.iter_child_nodes(node)
    return names - {"self", "cls", "ctx", "_"}


# ---- C++ and CUDA

CPP_TOKEN = re.compile(r"""[A-Za-z_]\w*|\.?\d[\w.']*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'"""
                       r"""|<<<|>>>|<<=|>>=|->|::|\+\+|--|&&|\|\||<<|>>|[-+*/%&|^=!<>]=|\S""")


ASSIGNMENTS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="}


def strip_comments(text):
    """the same text with comments blanked out; strings stay"""
    def keep_strings(match):
        part = match.group(0)
        return part if part[0] in "\"'" else blank(part)

    pattern = r'//[^\n]*|/\*.*?\*/|R"\((?:.|\n)*?\)"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, keep_strings, text, flags=re.S)


def blank(text): return re.sub(r"[^\n]", " ", text)


def count_cpp(text):
    lines = [CPP_TOKEN.findall(line) for line in strip_comments(text).splitlines()]
    return sum(map(len, lines)), sum(1 for line in lines if line)


def check_cpp(text, is_test):
    code = strip_comments(text)
    directive = r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*"
    code = re.sub(directive, lambda match: blank(match.group(0)), code, flags=re.M)
    for number, line in enumerate(code.splitlines(), 1):
        if count_semicolons(line) > 1 and not is_cpp_formula(line):
            yield f":{number}", "two statements on a line"
        elif has_body_on_its_line(line):
            yield f":{number}", "two statements on a line: the body of an if or a loop"
    for number, statement in cpp_statements(code):
        yield from check_cpp_statement(number, statement, is_test)


def count_semicolons(line):
    """those outside parentheses: the two of a for do not count"""
    depth = count = 0
    for token in CPP_TOKEN.findall(line):
        depth += (token == "(") - (token == ")")
        count += token == ";" and depth <= 0
    return count


def is_cpp_formula(line):
    """T f(x) { return formula; }, also as a lambda, or struct { T member; }"""
    braces = re.findall(r"\{([^{}]*;)\s*\}", line)
    rest = re.sub(r"\{[^{}]*;\s*\}", "", line)
    short = len(line.rstrip()) <= FORMULA_COLUMNS
    return short and len(braces) == 1 and braces[0].count(";") == 1 and rest.count(";") <= 1


def has_body_on_its_line(line):
    header = r"\s*(?:\}\s*)?(?:UNROLL\s+)?(else\s+if|if\s+constexpr|if|for|while|else)\b"
    match = re.match(header, line)
    if not match:
        return False
    rest = line[match.end():].strip()
    if match.group(1) == "else":
        return bool(rest) and not rest.startswith("{") and not rest.startswith("if")
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0 and character == ")":
            body = rest[i + 1:].strip()
            return bool(body) and not body.startswith("{") and body != ";"
    return False


def cpp_statements(code):
    """(line, tokens) of what lies between ; { and }, but for those inside brackets and lists"""
    statement = []
    open_brackets = []
    start = 0
    for number, line in enumerate(code.splitlines(), 1):
        for token in CPP_TOKEN.findall(line):
            # return {a, b}; and x = {a, b}; have a list in braces, not a block of statements.
            begins_list = token == "{" and statement and statement[-1] in ("return", "=")
            ends_statement = token in ";{}" and not open_brackets and not begins_list
            if ends_statement:
                if statement:
                    yield start, statement
                statement = []
                continue
            if token in "([{":
                open_brackets.append(token)
            elif token in ")]}" and open_brackets:
                open_brackets.pop()
            if not statement:
                start = number
            statement.append(token)


def check_cpp_statement(number, statement, is_test):
    top = top_level(statement)
    words = re.match(r"(?:[A-Za-z_]\w*::)*[A-Za-z_]\w*(?:<[\w, ]*>)?\s*(\S+)?", " ".join(top))
    is_return = top[0] == "return"
    next_token = words.group(1) if words else None
    is_expression = next_token in ASSIGNMENTS or next_token in ("(", ".", "->", "[", "++", "--")
    if "," in top and (is_return or is_expression) and ":" not in top:
        yield f":{number}", "statements joined by commas"
    if (is_expression or next_token == "?") and "?" in top:
        before = top[:top.index("?")]
        if not ASSIGNMENTS.intersection(before):
            yield f":{number}", "a conditional expression stands in for an if"
    if not is_test and has_nested_conditional(statement):
        yield f":{number}", "a conditional expression inside another"


def top_level(statement):
    """the tokens outside all brackets, the brackets themselves included"""
    depth = 0
    tokens = []
    for token in statement:
        depth -= token in (")", "]", "}")
        if depth == 0:
            tokens.append(token)
        depth += token in ("(", "[", "{")
    return tokens


def has_nested_conditional(statement):
    """is there a ? before the one before it has ended, by a comma or by the bracket around it?"""
    depth = 0
    open_at = []
    for token in statement:
        depth += token in ("(", "[")
        depth -= token in (")", "]")
        open_at = [d for d in open_at if d < depth or (d == depth and token != ",")]
        if token == "?":
            if open_at:
                return True
            open_at.append(depth)
    return False


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:], "style", go_on=""))
