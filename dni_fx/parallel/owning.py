"""That nobody else changes what threads work with: the modes of modules, and weights.

From a step on until ``drain`` they are the threads': what a caller changes in between would reach
batches that were posted before, each stage at another one. So it is refused. What is written by way
of ``.data`` tells no tensor, and cannot be noticed.
"""

from __future__ import annotations

from torch import nn

from ..errors import DecouplingError
from ..runtime.batch_state import Setting
from .undo import written_in

Modes = dict[int, bool]  # ``training`` by the module's identity


class PostedModes:
    """The modes of a model's modules, as the caller sets them; used by the caller's thread."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [*model.named_modules()]
        self._newest: Modes | None = None

    def rest(self) -> None:
        """Nothing is under way: modes may be changed."""
        self._newest = None

    def check(self) -> Modes:
        """The modes of now.

        Raises:
            DecouplingError: they were changed since the batch before, which may be under way.
        """
        now = {id(module): module.training for _, module in self.modules}
        for name, module in self.modules if self._newest not in (None, now) else ():
            assert self._newest is not None
            if now[id(module)] != self._newest[id(module)]:
                raise _another_mode(name, module)
        return now

    def post(self) -> Modes:
        """The modes of now, for a batch."""
        self._newest = self.check()
        return self._newest


class Owned:
    """What one stage's thread works with; nothing until it is claimed."""

    def __init__(self) -> None:
        self._versions: dict[nn.Parameter, int] = {}
        self._names: dict[nn.Parameter, str] = {}
        self._module: nn.Module | None = None
        self._modules: list[tuple[str, nn.Module]] = []

    def claim(self, setting: Setting, index: int) -> None:
        """From now on weights are the thread's: called while that is idle."""
        module = setting.stages[index].module
        free = {id(t) for t in written_in(module, setting.changes).values()}
        self._names = {p: n for n, p in module.named_parameters() if id(p) not in free}
        self._versions = {p: p._version for p in self._names}

    def note(self) -> None:
        """The thread itself has written to weights."""
        self._versions = {p: p._version for p in self._versions}

    def check_weights(self) -> None:
        """Refuse what another has written, if anything is claimed."""
        for parameter, version in self._versions.items():
            if parameter._version != version:
                raise DecouplingError(
                    f"parameter {self._names[parameter]!r} was changed from outside while batches "
                    "were under way, which would meet other weights than they were posted with: "
                    "call trainer.drain() before weights are changed (clipped, averaged, loaded)"
                )

    def check_modes(self, setting: Setting, index: int, posted: Modes) -> None:
        """Refuse modes that are not those that a batch was posted with."""
        module = setting.stages[index].module
        if not posted:
            return
        if self._module is not module:
            own = {id(c.owner) for c in setting.changes.contents}  # they change themselves
            self._modules = [(n, m) for n, m in module.named_modules() if id(vars(m)) not in own]
            self._module = module
        for name, part in self._modules:
            if posted.get(id(part), part.training) != part.training:
                raise _another_mode(name, part)


def _another_mode(name: str, module: nn.Module) -> DecouplingError:
    now = "training" if module.training else "evaluation"
    return DecouplingError(
        f"module {name or 'itself'!r} was put into {now} mode while batches were under way, which "
        "would be run in it though they were posted before: call trainer.drain() before a mode is "
        "changed"
    )
