"""An exact lexer for PostgreSQL 16 to 18: cuts a text into the tokens the server's own scanner sees.

The tokens tile the text: white space and comments are tokens too, so joining them gives the text back.
It never raises and never loops; what the server's scanner would refuse is a token of kind ERROR. Work is
linear in the length of the text. It refuses to know grammar, with one exception: which `;` ends a
statement, for which it counts parentheses and the nesting of `BEGIN ATOMIC ... END` bodies.

A hot module: with a C compiler the `.pxd` beside it adds C types to this same source.

Rules follow the PostgreSQL documentation, "Lexical Structure", and were checked against real servers by
`tests/integration/test_sql_against_server.py`.
"""

# Each kind has two names: one for the world, and one with an underscore that the .pxd makes a C int.
END = _END = 0  # no more text
SPACE = _SPACE = 1
COMMENT = _COMMENT = 2
ERROR = _ERROR = 3  # the server refuses the whole text
NUL = _NUL = 4  # a NUL byte and all after it, which the server does not read
WORD = _WORD = 5  # identifier or keyword, not quoted
QUOTED = _QUOTED = 6  # "..." or U&"..."
STRING = _STRING = 7  # any string form, continuations included; also B'' and X''
NUMBER = _NUMBER = 8
PARAM = _PARAM = 9  # $1
OPERATOR = _OPERATOR = 10
PUNCT = _PUNCT = 11  # , . .. : :: := [ ] and a ; that does not end a statement
LPAREN = _LPAREN = 12
RPAREN = _RPAREN = 13
SEMICOLON = _SEMICOLON = 14  # ends a statement

KIND_NAMES = (
    "END",
    "SPACE",
    "COMMENT",
    "ERROR",
    "NUL",
    "WORD",
    "QUOTED",
    "STRING",
    "NUMBER",
    "PARAM",
    "OPERATOR",
    "PUNCT",
    "LPAREN",
    "RPAREN",
    "SEMICOLON",
)

_MAX_OPERATOR = 63  # the server: "operator too long"


class Lexer:
    """A cursor over `text`: each `advance()` puts the next token into `kind`, `start` and `end`.

    `conforming` is the session's `standard_conforming_strings`; with it off, a backslash escapes in a
    plain '...' string. `depth` is the number of open parentheses before the next token, `body` the nesting
    of BEGIN ATOMIC and CASE in a routine's SQL body (0 outside one). To lex from the middle of a text, set
    `end` before the first `advance()`.
    """

    __slots__ = (
        "_after",
        "_create",
        "_singles",
        "body",
        "conforming",
        "depth",
        "end",
        "kind",
        "length",
        "start",
        "text",
    )

    def __init__(self, text: str, conforming: bool = True) -> None:
        self.text = text
        self.conforming = conforming
        self.kind = _END
        self.start = 0
        self.end = 0
        self.depth = 0
        self.body = 0
        nul = text.find("\0")
        self.length = len(text) if nul < 0 else nul
        self._singles = 0
        # Progress through CREATE [OR REPLACE] FUNCTION|PROCEDURE: 0 at the start of a statement, 1 after
        # CREATE, 2 after OR, 3 in a routine, -1 when this statement is none.
        self._create = 0
        # The previous token that counts: 1 BEGIN, 2 AS or '.', after which CASE and END are only names.
        self._after = 0

    def advance(self) -> int:
        """Read the next token and return its kind; END, again and again, when there is none."""
        kind = self._read()
        self.kind = kind
        if kind > _NUL:
            self._track(kind)
            kind = self.kind
        return kind

    def _read(self) -> int:
        text = self.text
        n = self.length
        i = self.end
        self.start = i
        if i >= n:
            if i >= len(text):
                return _END
            self.end = len(text)
            return _NUL
        c = text[i]
        j = i + 1

        if c == " " or "\t" <= c <= "\r":
            while j < n and (text[j] == " " or "\t" <= text[j] <= "\r"):
                j += 1
            self.end = j
            return _SPACE

        if "a" <= c <= "z" or "A" <= c <= "Z" or c == "_" or c >= "\x80":
            if j < n and (text[j] == "'" or text[j] == "&"):
                kind = self._prefixed(c, j)
                if kind:
                    return kind
            self.end = _word_end(text, j, n)
            return _WORD

        if "0" <= c <= "9" or (c == "." and j < n and "0" <= text[j] <= "9"):
            j = _number_end(text, i, n)
            self.end = abs(j)
            return _NUMBER if j > 0 else _ERROR

        if c == "'":
            return self._finish_string(_string_end(text, j, n, not self.conforming, True))
        if c == '"':
            return self._finish_quoted(j)
        if c == "(":
            self.end = j
            return _LPAREN
        if c == ")":
            self.end = j
            return _RPAREN
        if c == ";":
            self.end = j
            return _SEMICOLON
        if c in ",[]":
            self.end = j
            return _PUNCT
        if c == ".":
            self.end = j + 1 if j < n and text[j] == "." else j
            return _PUNCT
        if c == ":":
            self.end = j + 1 if j < n and (text[j] == ":" or text[j] == "=") else j
            return _PUNCT
        if c == "$":
            return self._dollar(j)
        if c == "-" and j < n and text[j] == "-":
            self.end = _line_end(text, j, n)
            return _COMMENT
        if c == "/" and j < n and text[j] == "*":
            j = _comment_end(text, j + 1, n)
            self.end = j if j > 0 else n
            return _COMMENT if j > 0 else _ERROR
        if c in "~!@#^&|`?+-*/%<>=":
            return self._operator(i, j)
        self.end = j
        return _ERROR

    def _prefixed(self, c: str, j: int) -> int:
        """A string or identifier with a prefix, `c` being the letter before `j`; 0 if it is none."""
        text = self.text
        n = self.length
        if text[j] == "'":
            if c in "eE":
                return self._finish_string(_string_end(text, j + 1, n, True, True))
            if c in "nN":
                return self._finish_string(_string_end(text, j + 1, n, not self.conforming, True))
            if c in "bBxX":
                return self._finish_string(_string_end(text, j + 1, n, False, False))
            return 0
        if c not in "uU" or j + 1 >= n:
            return 0
        if text[j + 1] == '"':
            return self._finish_quoted(j + 2)
        if text[j + 1] == "'":
            kind = self._finish_string(_string_end(text, j + 2, n, False, True))
            # The server refuses U&'' while backslashes already mean something else.
            return kind if self.conforming else _ERROR
        return 0

    def _finish_string(self, end: int) -> int:
        self.end = end if end > 0 else self.length
        return _STRING if end > 0 else _ERROR

    def _finish_quoted(self, j: int) -> int:
        """The rest of a quoted identifier whose first character is at `j`."""
        text = self.text
        n = self.length
        first = j
        while True:
            j = text.find('"', j, n)
            if j < 0:
                self.end = n
                return _ERROR
            j += 1
            if j >= n or text[j] != '"':
                break
            j += 1
        self.end = j
        # The server refuses an empty name.
        return _QUOTED if j > first + 1 else _ERROR

    def _dollar(self, j: int) -> int:
        """What a dollar sign before `j` starts: a parameter, a dollar-quoted string, or an error."""
        text = self.text
        n = self.length
        k = j
        while k < n and "0" <= text[k] <= "9":
            k += 1
        if k > j:
            if k < n and _starts_word(text[k]):
                self.end = _word_end(text, k, n)
                return _ERROR
            self.end = k
            return _PARAM
        while k < n and (_starts_word(text[k]) or (k > j and "0" <= text[k] <= "9")):
            k += 1
        if k >= n or text[k] != "$":
            self.end = j
            return _ERROR
        tag = text[j - 1 : k + 1]
        k = text.find(tag, k + 1, n)
        if k < 0:
            self.end = n
            return _ERROR
        self.end = k + len(tag)
        return _STRING

    def _operator(self, i: int, j: int) -> int:
        if i < self._singles:
            self.end = j
            return _OPERATOR
        text = self.text
        n = self.length
        c = text[i]
        special = c in "~!@#^&|`?%"
        # Where the trailing run of + and - begins.
        tail = j - 1 if c in "+-" else j
        while j < n:
            c = text[j]
            if c not in "~!@#^&|`?+-*/%<>=":
                break
            if j + 1 < n and ((c == "-" and text[j + 1] == "-") or (c == "/" and text[j + 1] == "*")):
                break
            j += 1
            if c not in "+-":
                tail = j
                if c in "~!@#^&|`?%":
                    special = True
        if not special and tail < j and j - i > 1:
            # Such an operator may not end in + or -: what is cut off are operators of one character
            # each. Remembering how far they reach keeps a long run linear.
            self._singles = j
            j = tail if tail > i else i + 1
        self.end = j
        return _OPERATOR if j - i <= _MAX_OPERATOR else _ERROR

    def _track(self, kind: int) -> None:
        """Keep `depth`, `body` and the way through CREATE FUNCTION; demote a `;` inside of them."""
        after = 0
        if kind == _WORD:
            if self._create >= 0:
                after = self._track_word()
        elif kind == _LPAREN:
            self.depth += 1
        elif kind == _RPAREN:
            if self.depth > 0:
                self.depth -= 1
        elif kind == _SEMICOLON:
            if self.depth > 0 or self.body > 0:
                self.kind = _PUNCT
            else:
                self._create = 0
        elif kind == _PUNCT and self.text[self.start] == ".":
            after = 2
        if self._create == 0 and self.kind != _SEMICOLON:
            self._create = -1
        self._after = after

    def _track_word(self) -> int:
        """Follow one word of a statement that may be CREATE FUNCTION; returns the new `_after`."""
        length = self.end - self.start
        if self._create == 3 and (length < 2 or length > 6):
            return 0
        word = self.text[self.start : self.end].lower()
        if self._create < 3:
            if self._create == 0:
                self._create = 1 if word == "create" else -1
            elif self._create == 1 and word == "or":
                self._create = 2
            elif self._create == 2 and word == "replace":
                self._create = 1
            else:
                self._create = 3 if word in ("function", "procedure") else -1
            return 0
        if self.depth == 0 and word == "begin":
            return 1
        if word == "atomic" and self._after == 1 and self.body == 0:
            self.body = 1
        elif self.body > 0 and self._after != 2:
            if word == "case":
                self.body += 1
            elif word == "end":
                self.body -= 1
        return 2 if word == "as" else 0


def _starts_word(c: str) -> bool:
    # The server takes every byte above 127 for a letter, so even a no-break space is one.
    return "a" <= c <= "z" or "A" <= c <= "Z" or c == "_" or c >= "\x80"


def _word_end(text: str, j: int, n: int) -> int:
    while j < n:
        c = text[j]
        if not ("a" <= c <= "z" or c == "_" or "A" <= c <= "Z" or "0" <= c <= "9" or c == "$" or c >= "\x80"):
            break
        j += 1
    return j


def _line_end(text: str, j: int, n: int) -> int:
    """Where the line that contains `j` ends: at a line feed, a carriage return or the end."""
    # Two find() would be shorter, and quadratic on a text with only the other kind of line break.
    while j < n and text[j] not in "\n\r":
        j += 1
    return j


def _comment_end(text: str, j: int, n: int) -> int:
    """The end of a nested comment whose content starts at `j`; -1 if it has none."""
    depth = 1
    close = -1
    while True:
        if close < j:
            close = text.find("*/", j, n)
            if close < 0:
                return -1
        # "/*/" opens, so the opening may overlap the closing that was found.
        opening = text.find("/*", j, close + 1)
        if opening >= 0:
            depth += 1
            j = opening + 2
        else:
            depth -= 1
            j = close + 2
            if depth == 0:
                return j


def _string_end(text: str, j: int, n: int, escapes: bool, doubled: bool) -> int:
    """The end of a string whose content starts at `j`, its continuations included; -1 if it has none.

    `escapes`: a backslash takes the next character; `doubled`: two quotes are one.
    """
    while True:
        if escapes:
            while j < n and text[j] != "'":
                j += 2 if text[j] == "\\" else 1
            if j >= n:
                return -1
        else:
            j = text.find("'", j, n)
            if j < 0:
                return -1
        j += 1
        if doubled and j < n and text[j] == "'":
            j += 1
            continue
        next_part = continuation(text, j, n)
        if next_part < 0:
            return j
        j = next_part


def continuation(text: str, j: int, n: int) -> int:
    """Where a string closed just before `j` goes on: after the next quote, if only white space with a
    line break and `--` comments stand between; else -1."""
    line_break = False
    while j < n:
        c = text[j]
        if c in "\n\r":
            line_break = True
        elif c == "'":
            return j + 1 if line_break else -1
        elif c == "-" and j + 1 < n and text[j + 1] == "-":
            j = _line_end(text, j, n)
            if j >= n:
                return -1
            line_break = True
        elif c != " " and not "\t" <= c <= "\r":
            return -1
        j += 1
    return -1


def _digits_end(text: str, j: int, n: int) -> int:
    """The end of decimal digits with single underscores between them, the first one at `j` if any."""
    while j < n:
        c = text[j]
        if "0" <= c <= "9":
            j += 1
        elif c == "_" and j + 1 < n and "0" <= text[j + 1] <= "9" and "0" <= text[j - 1] <= "9":
            j += 2
        else:
            break
    return j


def _based_end(text: str, j: int, n: int, base: str) -> int:
    """The end of the digits of a 0x, 0o or 0b number, starting after that prefix."""
    while j < n:
        k = j + 1 if text[j] == "_" and j + 1 < n else j
        c = text[k]
        if "0" <= c <= "1":
            pass
        elif "2" <= c <= "7":
            if base in "bB":
                break
        elif "8" <= c <= "9" or "a" <= c <= "f" or "A" <= c <= "F":
            if base not in "xX":
                break
        else:
            break
        j = k + 1
    return j


def _number_end(text: str, i: int, n: int) -> int:
    """The end of the number at `i`, negated when the server refuses it (letters glued to it)."""
    j = i
    if text[i] == "0" and i + 1 < n and text[i + 1] in "xXoObB":
        j = _based_end(text, i + 2, n, text[i + 1])
        if j == i + 2 or (j < n and (_starts_word(text[j]) or text[j] == "$" or "0" <= text[j] <= "9")):
            return -_word_end(text, j, n)
        return j
    j = _digits_end(text, i, n)
    if j < n and text[j] == ".":
        # 1..2 is a range of two integers.
        if j + 1 < n and text[j + 1] == "." and j > i:
            return j
        j += 1
        if j < n and "0" <= text[j] <= "9":
            j = _digits_end(text, j, n)
    if j < n and (text[j] == "e" or text[j] == "E"):
        k = j + 1
        if k < n and (text[k] == "+" or text[k] == "-"):
            k += 1
            if k >= n or not "0" <= text[k] <= "9":
                return -k
        if k < n and "0" <= text[k] <= "9":
            j = _digits_end(text, k, n)
    if j < n and _starts_word(text[j]):
        return -_word_end(text, j, n)
    if j < n and text[j] == "$":
        # The server prefers the longest match, and 1_0$ or 1e5$ make a longer one: a number and a word.
        k = j - 1
        while k > i and ("0" <= text[k] <= "9" or _starts_word(text[k])):
            if _starts_word(text[k]):
                return -_word_end(text, j, n)
            k -= 1
    return j


def tokenize(text: str, conforming: bool = True) -> list[tuple[int, int, int]]:
    """All tokens of `text` as (kind, start, end), without the closing END."""
    lexer = Lexer(text, conforming)
    tokens = []
    while lexer.advance() != END:
        tokens.append((lexer.kind, lexer.start, lexer.end))
    return tokens


def split(text: str, conforming: bool = True) -> list[tuple[int, int]]:
    """The statements of `text` as (start, end), from the first to past the last token that counts.

    Empty statements (nothing but white space and comments between two `;`) are left out, as the server
    does. A text with an error in it is one that the server runs no part of; it is cut all the same.
    """
    lexer = Lexer(text, conforming)
    spans = []
    start = end = -1
    while True:
        kind = lexer.advance()
        if kind in (SPACE, COMMENT):
            continue
        if kind in (SEMICOLON, END, NUL):
            if start >= 0:
                spans.append((start, end))
            start = -1
            if kind != SEMICOLON:
                return spans
        else:
            if start < 0:
                start = lexer.start
            end = lexer.end
