"""An EMA as something that is kept: its state as a dictionary or in a file, and going on from there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

from numpy.typing import DTypeLike

from .. import _arrays
from .._types import Array, Decay
from ..checkpoint._replace import StrPath
from ..checkpoint._state import Saved
from .count import Count, Now
from .exchange import to_the_end
from .mapping import check_not_loaded_from
from .parts import Parts
from .state import State, file_content, fitting
from .tree import Nested, Selection


class Resumable(ABC):
    """Averages that can be saved, and go on from what was saved."""

    _parts: Parts
    _now: Now
    _config: dict[str, Any]  # what is saved of the arguments
    _method: ClassVar[str | None] = None  # what states say that they are of; None: an EMA

    @abstractmethod
    def __init__(self, values: Nested, **options: Any) -> None: ...

    @abstractmethod
    def wait(self) -> None:
        """Return when all that was asked for is done."""

    @abstractmethod
    def _settled(self) -> Count:
        """Return how far averaging has come."""

    @abstractmethod
    def _followed(self) -> Parts:
        """Return the parts for what holds the values by now."""

    def __repr__(self) -> str:
        arrays = len(self._parts.values.leaves)
        swapped = ", in the place of the weights" if self._parts.exchange.swapped is not None else ""
        name = type(self).__name__
        return f"<fastema.{name} of {arrays} array{'s'[: arrays != 1]}, step {self._settled().step}{swapped}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an EMA cannot be copied or pickled: a copy would not know its values; use state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that is needed to go on: of torch's values tensors, else NumPy arrays.

        Of sharded values the shards that are here: DTensors, or several as ``name/0``, ``name/1``.

        Returns:
            A dictionary: ``"averages"`` and ``"carries"`` (for each decay a dictionary of names and arrays),
            ``"copied"`` and ``"values"`` (of names and arrays; the weights, while averages are in their
            place, else nothing), ``"step"``, ``"clock"`` and ``"averaged"`` (its times by now and at the last
            average), ``"decay"`` (the last ones), ``"products"`` (of all decays, for ``initial="zeros"``),
            ``"swapped"`` (which averages are in the place of the weights, or None) and ``"config"``
            (arguments of the constructor, for the record).

        Example:
            >>> import fastema, numpy as np
            >>> ema = fastema.EMA({"w": np.ones(2)}, 0.9)
            >>> state = ema.state_dict()
            >>> state["averages"], state["step"]
            ([{'w': array([1., 1.])}], 0)
            >>> fastema.EMA({"w": np.zeros(2)}, 0.9).load_state_dict(state)
        """
        return dict(self._state(lambda leaf, x: leaf.to_state(_arrays.host_copy(x))).to_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, to the bit.

        A state that was saved while averages were in the place of the weights is loaded so, too: the values
        hold the averages then, and `swap` gives the weights of that time back, whichever the model's own
        checkpoint held.

        Args:
            state: What `state_dict` returned, of values of the same names, shapes and types, as many decays
                and carries or none alike. Copied.

        Raises:
            RuntimeError: Averages are in the place of the weights now.
            KeyError: Something is missing.
            TypeError: A type differs, or a value never changes and the state was saved while swapped.
            ValueError: The state does not fit. Whatever is raised, nothing has changed.
        """
        self.wait()
        self._parts.exchange.check_not_swapped("load_state_dict()")
        exchange = self._followed().exchange
        method = state.get("config", {}).get("method", {}).get("name")
        if method != self._method:
            raise ValueError(
                f"state must be of fastema.{self._method or 'EMA'}, got one of fastema.{method or 'EMA'}"
            )
        fitted = State.from_dict(state).local(exchange).fitted(exchange)
        to_the_end(fitted.go_on, exchange, self._now)

    def save(self, path: StrPath, dtype: DTypeLike | None = None) -> None:
        """Write all that is needed to go on into a safetensors file; a crash leaves the old one or the new.

        The averages of the first decay, as `averages` shows them, and what is copied have the names of the
        values: any reader of the format finds them. What only `load` reads has names that begin with
        ``fastema.``. Nothing is copied but averages that started at zeros. A schedule of your own is saved as
        its name alone.

        Sharded values are saved as a set of files, ``name-00001-of-00004.safetensors`` and so on, one for
        each process (torch) or device (JAX) with the shards that are there; of replicas, the first. What is
        whole is in the first file. Every process calls this, and writes its own. Offsets are in the
        metadata, as `torch.distributed.checkpoint` has them. Files are replaced one by one: a crash can leave
        some of this save and some of an earlier one. `load` refuses these where step, arguments or run
        differ: a process that writes them all names the save in each, several name the run, by what lies in
        the store of torch.distributed or JAX, if there is one. Two saves of one run at one step are not told
        apart. Give each step a path of its own.

        Args:
            path: Of the file, see `fastema.checkpoint.write`; without the numbers that a set has. Saved over
                the file of `memory`, it takes that name; averages stay in the old one, which is gone when
                the process ends.
            dtype: Of the averages in the file, as ``"bfloat16"`` for half the size: those that are shown,
                rounded once, to nearest, ties to even. Such a file is for others: nothing goes on from it.

        Raises:
            TypeError: `dtype` is no type that is averaged.
            ValueError: A value has a name that begins with ``fastema.``, or an average is beyond `dtype`.
            OSError: The file cannot be written. The old one is as it was.

        Example:
            >>> import fastema, numpy as np, tempfile
            >>> path = tempfile.mkdtemp() + "/averages.safetensors"
            >>> fastema.EMA({"w": np.ones(2)}, fastema.schedules.dynamic(0.99)).save(path)
            >>> fastema.checkpoint.File(path)["w"]
            array([1., 1.])
            >>> fastema.EMA.load(path, {"w": np.zeros(2)}).averages
            {'w': array([1., 1.])}
        """
        self._state(lambda _, x: file_content(x)).write(path, self._parts.exchange, self._config, dtype)

    @classmethod
    def load(
        cls, path: StrPath, values: Nested, *, decay: Decay | Sequence[Decay] | None = None, **options: Any
    ) -> Self:
        """Go on from a file of `save`, to the bit, as the run that wrote it would have.

        Saved while averages were in the place of the weights, it is loaded so, too, as by `load_state_dict`.
        Values may be sharded otherwise than they were, or not at all: each process reads what it needs.

        Args:
            path: Of the file, as it was given to `save`, or of one of a set.
            values: As for `EMA`: of the same names and, in all, shapes.
            decay: As for `EMA`. None: as it was, which a schedule of your own cannot be.
            options: Arguments of `EMA` of this process, as `threads` and `memory`, or that are to change.

        Returns:
            The averages, with their step and configuration.

        Raises:
            TypeError: A type differs, or a value never changes and the file was saved while swapped.
            ValueError: The file is not whole, was not written by `save` (without `dtype`), does not fit, or
                `decay` must be given; or the files of a set are of several saves, or there are several
                sets; or `memory` is a file that is loaded from. Whatever is raised, nothing has changed.
            OSError: A file cannot be read, or is missing in a set.
        """
        with Saved.opened(path) as saved:
            arguments = {**saved.plain.config.arguments(cls._method, decay, path), **options}
            if options.get("memory") is not None:
                check_not_loaded_from(options["memory"], saved.paths)
            values = list(values) if isinstance(values, Iterator) else values
            state = State.of_saved(saved)
            with fitting(path):
                state.check_is_of(values, Selection(arguments["buffers"], options.get("only")))
                ema = cls(values, **arguments)
                exchange = ema._parts.exchange
                state.cut(exchange).fitted(exchange).go_on(exchange, ema._now)
        return ema

    def _state(self, contents: Callable[[_arrays.Leaf, Array], Array]) -> State:
        self.wait()
        known = ("every", "start_step", "rounding", "seed", "method")
        config = {key: self._config[key] for key in known if key in self._config}
        return State.of(self._followed().exchange, self._settled(), config, contents)
