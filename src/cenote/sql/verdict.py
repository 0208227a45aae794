"""What the classifier says about a text, and the notebook it is gathered in. Data only, no decisions."""

from cenote.sql import touch
from cenote.sql.literals import fold

Assign = tuple[str, str, bool]
#: Not a setting's value, but what it has without one.
DEFAULT = "default"


class Verdict:
    """What running a text may do to the session. Shared by all who ask about the same text: do not change it.

    - `touches`: flags of `cenote.sql.touch`; 0 means that the text itself cannot touch session state.
    - `settings`: the settings set or reset, in lower case; empty although `touches` has SETTINGS when they
      are not all known (RESET ALL, a computed name). ROLE never adds a name here.
    - `verb`: the first keyword of the last statement that is not transaction control, else of the first, in
      upper case; "" for a text without statements.
    - `unknown_functions`: functions called that do not come with the server, each once, in order, as
      `name` or `schema.name`.
    - `hidden`: runs code that the text does not show: triggers, rules, defaults, event triggers, bodies
      (DML, DDL, COPY, CALL, DO, EXECUTE). With `unknown_functions` this is what an audit is for.
    - `reads`: flags of the state of earlier statements that this one needs (`currval`, `EXECUTE`, `FETCH`).
    - `defines`: creates or alters what may run code later, or what a session begins with.
    - `assigns`: what it sets for its transaction only, and what it may take back to the default: name, source
      and whether for the transaction only. The name is "" if it cannot be told, `$1` if a parameter has it. The
      source is `$2` if a parameter has the value, DEFAULT if that is a NULL or may come out as one, else "".
    - `opens_transaction`: the text leaves a transaction block open that it began.
    - `statements`: how many statements the server will run.
    """

    __slots__ = (
        "assigns",
        "defines",
        "hidden",
        "opens_transaction",
        "reads",
        "settings",
        "statements",
        "touches",
        "unknown_functions",
        "verb",
    )

    def __init__(
        self,
        *,
        touches: int = 0,
        settings: tuple[str, ...] = (),
        verb: str = "",
        unknown_functions: tuple[str, ...] = (),
        hidden: bool = False,
        reads: int = 0,
        assigns: tuple[Assign, ...] = (),
        opens_transaction: bool = False,
        statements: int = 1,
        defines: bool = False,
    ) -> None:
        self.touches = touches
        self.settings = settings
        self.verb = verb
        self.unknown_functions = unknown_functions
        self.hidden = hidden
        self.reads = reads
        self.assigns = assigns
        self.opens_transaction = opens_transaction
        self.statements = statements
        self.defines = defines

    def __repr__(self) -> str:
        facts = [f"touches {', '.join(touch.words(self.touches))}" if self.touches else "touches nothing"]
        facts += [f"{name}={getattr(self, name)!r}" for name in self.__slots__ if name not in ("touches", "verb")]
        return f"<Verdict {self.verb or 'empty'}: {'; '.join(facts)}>"


class Findings:
    """What was found so far in a statement or a text. `settings` is None once a name could not be told.

    The names are keys of a dictionary: each once, in order, and a long text stays linear.
    """

    __slots__ = ("assigns", "defines", "hidden", "reads", "settings", "touches", "unknown_functions")

    def __init__(self) -> None:
        self.touches = 0
        self.assigns: dict[Assign, None] = {}
        self.settings: dict[str, None] | None = {}
        self.unknown_functions: dict[str, None] = {}
        self.hidden = False
        self.defines = False
        self.reads = 0

    def setting(self, name: str | None) -> None:
        """Note that a setting is set or reset: `name` in any case, None if it cannot be told."""
        if name is None:
            # It could also be `role` or `session_authorization`. (It could be `seed` too, but a random
            # seed is nobody's data, and closing a connection for it would hit every computed name.)
            self.touches |= touch.SETTINGS | touch.ROLE
            self.settings = None
            return
        name = fold(name)
        if name in ("role", "session_authorization"):
            self.touches |= touch.ROLE
            return
        self.touches |= touch.SETTINGS
        if name == "seed":
            self.touches |= touch.LOAD
        if self.settings is not None:
            # Some names the server still takes for others.
            self.settings[_RENAMED.get(name, name)] = None

    def assign(self, name: str | None, source: str, local: bool) -> None:
        """Note what `Verdict.assigns` tells; `name` as for `setting`."""
        name = fold(name or "")
        self.assigns[_RENAMED.get(name, name), source, local] = None

    def every_setting(self) -> None:
        """Note that all settings are reset. It leaves the role alone, as RESET ALL does."""
        self.touches |= touch.SETTINGS
        self.settings = None

    def add(self, other: "Findings") -> None:
        """Take over all that `other` found."""
        self.touches |= other.touches
        self.reads |= other.reads
        self.hidden = self.hidden or other.hidden
        self.defines = self.defines or other.defines
        self.unknown_functions.update(other.unknown_functions)
        self.assigns.update(other.assigns)
        if self.settings is None or other.settings is None:
            self.settings = None
        else:
            self.settings.update(other.settings)


_RENAMED = {"sort_mem": "work_mem", "vacuum_mem": "maintenance_work_mem"}
