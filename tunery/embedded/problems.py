"""What stops a start, said in four parts: what, why, fix, reference."""


class Refused(Exception):
    """Something the user has to change before this can go on. Never holds a secret."""

    def __init__(self, what: str, *, why: str, fix: str, reference: str = "docs/local.md") -> None:
        super().__init__(what)
        self.what, self.why, self.fix, self.reference = what, why, fix, reference

    def text(self) -> str:
        indented_why = self.why.replace("\n", "\n       ")
        return f"error: {self.what}\nwhy:   {indented_why}\nfix:   {self.fix}\ndocs:  {self.reference}"
