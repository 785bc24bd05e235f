"""Which module alone reads what another one has computed: what may be merged into one."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from earlybird.calls import as_call, tensors_in

__all__ = ["sole_readers"]


def sole_readers(
    model: nn.Module, example_inputs: Any, producer: type[nn.Module], reader: type[nn.Module]
) -> dict[nn.Module, list[nn.Module]]:
    """Return the producers whose output only a reader reads, in each of their calls, and who gets to see it.

    The model runs once, as it is; whoever calls puts it into the right mode.

    Args:
        model: Any.
        example_inputs: What it is called with.
        producer: Exactly this class, no subclass.
        reader: Exactly this class.

    Returns:
        Producer to modules: its readers, and those around that take or return what is between the two.
    """
    call = as_call(example_inputs)
    handles, readers = [], _Readers(producer, reader)
    with readers:
        for module in model.modules():
            handles += [
                module.register_forward_pre_hook(readers.before, with_kwargs=True),
                module.register_forward_hook(readers.after),
            ]
        try:
            result = model(*call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for tensor in tensors_in(result):
            readers.note(tensor)
        del result
        return readers.found()


class _Output:
    """One result of a producer, and who has read it."""

    def __init__(self, module: nn.Module, y: Tensor) -> None:
        self.module, self.tensor = module, weakref.ref(y)
        self.readers: list[nn.Module] = []
        self.others = 0
        self.seers: list[nn.Module] = []
        self.open = True  # it still is what the producer has computed

    def found(self) -> list[nn.Module] | None:
        # who is still alive is kept somewhere, for whoever will read it
        kept = self.open and self.tensor() is not None
        return [*self.readers, *self.seers] if len(self.readers) == 1 and not self.others and not kept else None


class _Readers(TorchDispatchMode):
    """Sees every operator, and what goes into and out of modules."""

    def __init__(self, producer: type[nn.Module], reader: type[nn.Module]) -> None:
        super().__init__()
        self._producer, self._reader = producer, reader
        self._outputs: list[_Output] = []
        self._of: dict[int, _Output] = {}  # by the tensor's id, which another one may have later
        self._reading: nn.Module | None = None

    def _output(self, tensor: Tensor) -> _Output | None:
        output = self._of.get(id(tensor))
        return output if output is not None and output.open and output.tensor() is tensor else None

    def note(self, value: Any) -> None:
        """Count another reader of every tensor in ``value``."""
        for tensor in tensors_in(value):
            output = self._output(tensor)
            if output is not None:
                output.others += 1

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of every module."""
        for tensor in tensors_in((args, kwargs)):
            output = self._output(tensor)
            if output is not None and type(module) is self._reader:
                output.readers.append(module)
                self._reading = module
            elif output is not None:
                output.seers.append(module)

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Forward hook of every module."""
        if module is self._reading:
            self._reading = None
            if (output := self._output(result)) is not None:
                output.open = False
        elif type(module) is self._producer and isinstance(result, Tensor):
            for earlier in self._outputs:
                if earlier.module is module and not earlier.readers:
                    earlier.others += 1  # in training, an output that waits would look like one that no reader gets
            output = _Output(module, result)
            self._outputs.append(output)
            self._of[id(result)] = output
        else:
            for tensor in tensors_in(result):
                if (output := self._output(tensor)) is not None:
                    output.seers.append(module)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._reading is None:
            self.note((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def found(self) -> dict[nn.Module, list[nn.Module]]:
        """Return what `sole_readers` does, after the pass."""
        every: dict[nn.Module, list[list[nn.Module] | None]] = {}
        for output in self._outputs:
            every.setdefault(output.module, []).append(output.found())
        alone = {}
        for module, calls in every.items():
            seen = [seers for seers in calls if seers is not None]
            if len(seen) == len(calls):
                alone[module] = list(dict.fromkeys(seer for seers in seen for seer in seers))
        return alone
