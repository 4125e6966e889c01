"""Averages of a model's weights for training loops of one's own: two lines in any framework."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

from numpy.typing import DTypeLike

from ._arrays.modules import copied_state
from ._ema.averages import Form
from ._ema.background import Background, Task
from ._ema.count import Count, Now, Pace, Rule, check_span, settled
from ._ema.exchange import Block, Swapping, any_swapped
from ._ema.parts import Options, Parts
from ._ema.passes import NonFinite
from ._ema.resumable import Resumable
from ._ema.shown import Divided
from ._ema.tree import Buffers, Nested, Only, Selection
from ._ema.views import Views
from ._types import Decay, check_choice, check_count, check_share, float_type
from .checkpoint._replace import StrPath
from .functional import Engine


class EMA(Resumable):
    """Exponential moving averages of weights, updated in place after every step of training.

    ``average += (1 - decay) * (value - average)``, with NumPy's bits, by native code and in one call for
    all arrays. Takes what a model of any library is made of: NumPy arrays, torch tensors and modules, JAX
    arrays, tf.Variables and keras.Variables, all in CPU memory; torch tensors and CuPy arrays on CUDA
    devices, whose averages lie there too; and torch tensors on any other device (MPS, XPU, XLA, ...), which
    torch's own operations average there, as exactly as it computes. Averages start at the values.

    Sharded values, which are torch's DTensors (parameters of `fully_shard`) and JAX arrays over several
    devices, are averaged where they lie: each process has the averages of its shards, nothing is gathered, no
    call waits for another process, and averages are shown sharded alike. They have the bits of whole ones
    but with stochastic rounding, which goes by the place in a shard.

    Arrays of integers and booleans (counters, masks) are copied at each update, complex ones averaged by
    their parts. Keys of random numbers, Python's numbers, sparse and quantised tensors that need no gradient
    are carried along: shown as they are, never changed, never saved. An array that is given twice (tied
    weights) is averaged once.

    A module, dictionary or list that was given is looked at again at each call. Other arrays of the same
    names, types and shapes in it are followed; so are buffers that appear, grow or go. Other changes are
    errors that name the value and the cure. After an update with other arrays, `swap` and `copy_to` are of
    these. Names are those of the plain model: wrappers of torch.compile, DDP and checkpointing have none.

    Methods are for one thread at a time. After Ctrl-C in a swap, `is_swapped` is true to the arrays, and
    another `swap` gives the weights back.

    Args:
        values: An array, a sequence or a mapping of arrays, also nested, or anything with
            ``named_parameters()``. Arrays that can change are kept and read again at each update. In native
            byte order, and without a mask.
        decay: From 0 to 1, towards 1 is slower; or a schedule, called with the number of updates, the
            present one included. A sequence of either: as many averages, in one pass over the values.
        every: Average at every so many updates only, with the product of the decays of all of them: where
            weights stand still in between, that is the same average.
        start_step: The first update (step of the clock) that averages; before it, an average is a copy.
        initial: ``"values"``, or ``"zeros"``: averages start at nothing, and what is shown is divided by
            one minus the product of all decays used, so that the first values have no extra weight. What is
            kept stays undivided.
        dtype: Of the averages of floating arrays. None: float32 for float16 and bfloat16 values, for
            others their own. float64 for any values, float32 for 16-bit ones; of fewer bits than values
            only float16 and bfloat16 for float32 ones.
        rounding: ``"nearest"``; ``"stochastic"``, for 16-bit averages, which stand still otherwise; or
            ``"compensated"``: a second array beside each average keeps what rounding loses.
        seed: Of stochastic rounding.
        buffers: What to do with a module's buffers (those that its checkpoints hold). ``"copy"``: as torch's
            own `AveragedModel`, since the statistics of batch normalisation are averages already;
            ``"average"``: as parameters; ``"ignore"``.
        device: Where averages are kept. None: where their values are. ``"cpu"``: in host memory, also those
            of values on a CUDA device, as by `fastema.cuda.Offload`; what is copied, not averaged, stays on
            the device. Averages of values on any other device lie beside these.
        background: Average in another thread, while the next step runs. Only for arrays that cannot change
            meanwhile: JAX's, which must not be donated to that step.
        threads: How many threads to use at most; 0: as `fastema.update` chooses.
        memory: The path of a file to keep the averages in, mapped, for more averages than memory. It is made
            anew, whatever was there, and is none that is loaded from or that values are mapped from. A forked
            child cannot use them. Averages on a CUDA device need ``device="cpu"`` for it.
        only: Which arrays are meant: patterns of names, as ``["*.lora_?.*"]``, or a function of name, value
            as ``lambda name, value: value.requires_grad``. What is left out costs nothing: it is not kept,
            copied, swapped or saved, and `averages` has no such name (None in a sequence or a tree of JAX).

    Raises:
        ImportError: A value lies on a CUDA device, and CuPy is not installed.
        TypeError: A value is no array, or of a type that is not offered.
        ValueError: An argument is outside of its range, or an array has holes; or `memory` is the file that
            values are mapped from.

    Example:
        >>> import fastema, numpy as np
        >>> weights = {"kernel": np.ones((2, 2)), "bias": np.zeros(2)}
        >>> ema = fastema.EMA(weights, decay=0.75)
        >>> for _ in range(2):
        ...     weights["bias"] += 1.0  # a step of training
        ...     ema.update()
        >>> ema.averages["bias"]
        array([0.6875, 0.6875])
        >>> with ema.swapped():
        ...     print(weights["bias"])
        [0.6875 0.6875]
        >>> weights["bias"]
        array([2., 2.])
    """

    def __init__(
        self,
        values: Nested,
        decay: Decay | Sequence[Decay] = 0.999,
        *,
        every: int = 1,
        start_step: int = 0,
        initial: Literal["values", "zeros"] = "values",
        dtype: DTypeLike | None = None,
        rounding: Literal["nearest", "stochastic", "compensated"] = "nearest",
        seed: int = 0,
        buffers: Buffers = "copy",
        device: Literal["cpu"] | None = None,
        background: bool = False,
        threads: int = 0,
        memory: StrPath | None = None,
        only: Only | None = None,
    ) -> None:
        check_choice(initial, "initial", ("values", "zeros"))
        check_choice(rounding, "rounding", ("nearest", "stochastic", "compensated"))
        check_choice(buffers, "buffers", ("copy", "average", "ignore"))
        check_choice(device, "device", (None, "cpu"))
        self._pace: Rule = (pace := Pace.of(decay, every, start_step))
        kept = None if dtype is None else float_type(dtype)
        self._config: dict[str, Any] = {  # what is saved of the arguments
            "every": pace.every,
            "start_step": pace.start_step,
            "rounding": rounding,
            "seed": check_count(seed, "seed"),
            "decay": list(pace.decays) if pace.several else pace.decays[0],
            "dtype": None if kept is None else kept.name,
            "buffers": buffers,
        }
        threads = check_count(threads, "threads")
        stochastic = self._config["seed"] if rounding == "stochastic" else None

        decays = len(pace.decays)
        form = Form(Divided(decays), decays, kept, rounding, device == "cpu", memory, buffers)
        self._parts = Parts.of(
            values, Options(Selection(buffers, only), form, background, stochastic, threads, Views())
        )
        self._background = Background() if background else None
        self._start = Count.at_start(decays, zeros=initial == "zeros")
        self._now: Now = [self._start]

    # --- updates ----------------------------------------------------------------------------------

    def update(
        self,
        values: Nested | None = None,
        *,
        span: float = 1,
        fence: bool = True,
        non_finite: NonFinite = "average",
    ) -> None:
        """Count a step of training, and move the averages towards the values.

        Args:
            values: The new values, shaped as those given at first: JAX arrays do not change, so that each
                step leaves others. None: the arrays given at first.
            span: How much time passes on the clock of schedules, half-lives and `start_step`; above 0: the
                samples or tokens of a batch, seconds, a weight. Averages move as by that many updates with
                these values. With `schedules.equal_weights` they are the mean of values weighted so.
            fence: Of averages in host memory of values on a CUDA device: whether the device is to change no
                value before it was copied, whatever it is asked for next. Values of more than 256 MB are
                copied in turns, and the host waits until the last turn has begun. False: call `fence`
                before the values change, as late as can be.
            non_finite: What to do where a value that is averaged holds an infinity or a NaN, which would stay
                in its average for ever. ``"average"``: not to look. ``"raise"``: an error that names the
                value. ``"skip"``: count the step and its time, and neither average nor copy anything; the
                next update that averages has the decay of all the time since the last one, as with `every`.
                All that is averaged is looked at first, by one more read of it, in host memory alone.

        Raises:
            FloatingPointError: A value is not finite, and `non_finite` is ``"raise"``. Nothing has changed.
            RuntimeError: Averages are in the place of the weights, these or another EMA's; what was given has
                values that do not fit any more; a CUDA graph is being captured; or this update or the one
                before failed in host memory beside the device, and some averages may have moved.
            ValueError: The values do not fit those given at first; or `non_finite` is to look at values on a
                device, or sharded over processes. Nothing has changed then.
        """
        parts = self._parts
        if non_finite != "average":
            check_choice(non_finite, "non_finite", ("average", "raise", "skip"))
            parts.passes.check_can_look(non_finite)
        if parts.exchange.swapped is not None:  # each call takes its time here
            parts.exchange.check_not_swapped("update()")
        if any_swapped():
            parts.exchange.check_not_covered("update()")
        if self._background is not None:
            self.wait()
        before, span = self._settled(), 1 if type(span) is int and span == 1 else check_span(span)
        parts, arrays, later = (parts.bound(), None, None) if values is None else parts.given(values)
        passes, now = parts.passes, self._now
        try:
            if not self._pace.averages_at(before.step + 1, before.clock + span):
                copied = None if before.decays else passes.only_copied(arrays, before)
                self._parts = parts
                parts.values.keep(later, arrays)
                passes.skip(copied, before.skip(span), now)
                return
            count = before.next(self._pace, span)
            if self._background is not None:
                now = [before]
                work = partial(passes.average, parts.values.sources(arrays), before, count, now)
                work = partial(work, non_finite=non_finite, held=before.hold(span))
                parts.values.keep(later, arrays)
                self._background.start(Task(work, now, count))
                return
            over = passes.over(arrays, before, count)
            held = non_finite != "average" and passes.holds(over, non_finite)
            self._parts = parts
            parts.values.keep(later, arrays)
            if held:
                now[0] = before.hold(span)
            else:
                passes.move(over, before, count, now)
        except BaseException:
            self._settled()
            raise
        if fence and parts.averages.on_host:
            self.fence()

    def reset(self, values: Nested | None = None) -> None:
        """Start again from the weights, as when the EMA was made: averages, carries, step and clock.

        The averages stay the arrays that they are.

        Args:
            values: As for `update`: what to start at. None: the weights as they are now.

        Raises:
            RuntimeError: As for `update`.
            ValueError: The values do not fit, or must be given (JAX). Nothing has changed.

        Example:
            >>> import fastema, numpy as np
            >>> weights = {"w": np.zeros(2)}
            >>> ema = fastema.EMA(weights, 0.5)
            >>> weights["w"] += 1.0  # as pretraining ends
            >>> ema.update()
            >>> ema.reset()
            >>> ema.averages["w"], ema.step
            (array([1., 1.]), 0)
        """
        self._parts.exchange.check_not_swapped("reset()")
        self._parts.exchange.check_not_covered("reset()")
        self.wait()
        before = self._settled()
        parts, arrays, later = (
            (self._parts.bound(), None, None) if values is None else self._parts.given(values)
        )
        self._parts = parts
        parts.passes.start_again(arrays, later, before, self._start, self._now)

    def fence(self) -> None:
        """Have CUDA devices change no value before the last update has copied it to host memory.

        Only where averages are kept there (``device="cpu"``), and after ``update(fence=False)``, which starts
        the copies and returns. The device waits, in the current stream; the host waits for the beginning of
        the last copy alone.

        Raises:
            RuntimeError: The update failed; some averages may have moved.

        Example:
            The copies run beside the forward and the backward pass::

                ema = fastema.EMA(model, 0.999, device="cpu")
                optimizer.register_step_pre_hook(lambda *_: ema.fence())
                for batch in batches:
                    loss(model, batch).backward()
                    optimizer.step()
                    ema.update(fence=False)
        """
        self._parts.passes.fence()

    def wait(self) -> None:
        """Return when all that was asked for is done.

        Raises:
            Exception: What stopped an update in the background; that update was not counted then.
            RuntimeError: An update of averages in host memory failed beside the device; some may have moved.
        """
        self._parts.passes.wait()
        if self._background is None or (task := self._background.pending) is None:
            return
        error = task.error()
        self._now = task.now
        self._background.forget()
        if error is not None:
            raise error

    def _settled(self) -> Count:
        """Return how far averaging has come, when what an interrupt left is done."""
        if self._background is not None and (task := self._background.pending) is not None:
            return task.after
        return settled(self._now)

    # --- averages ---------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The number of updates seen; set, the number and time that schedules, `every` and so on go on from.

        It can be set to a whole number from 0. The clock follows; averages stay as they are, and count as
        those of that step. That is a RuntimeError where updates took other spans than 1, as no step tells the
        time then, and while averages are in the place of the weights.
        """
        return self._settled().step

    @step.setter
    def step(self, step: int) -> None:
        step = check_count(step, "step")
        self._parts.exchange.check_not_swapped("setting step")
        self.wait()
        self._now[0] = self._settled().at_step(step, self._pace)

    @property
    def clock(self) -> float:
        """The time that has passed: the sum of all spans, and so equal to `step` where none was given."""
        return self._settled().clock

    @property
    def decay(self) -> float | tuple[float, ...] | None:
        """The decay last used, of all steps taken at once; of several averages, a tuple; None before."""
        decays = self._settled().decays
        if not decays:
            return None
        return decays if self._pace.several else decays[0]

    @property
    def engine(self) -> Engine:
        """What moves averages: ``"native"`` code, ``"cuda"`` kernels, or ``"torch"``; the last of several."""
        return self._parts.passes.engine

    @property
    def averages(self) -> Nested:
        """The averages, shaped as the values, in arrays of their library; of several, the first ones.

        NumPy's, torch's and CuPy's are the averages themselves, until the next `swap`, unless they started at
        zeros; others are copies. Before the first update that averages (the k-th with ``every=k``) they are
        copies of the weights as these are now. Those in host memory beside a device go on moving until `wait`
        after each update.
        """
        return self.averages_of(0)

    def averages_of(self, k: int) -> Nested:
        """Return the averages of the k-th decay, as `averages`."""
        k = self._parts.averages.checked_index(k)
        self.wait()
        return self._followed().exchange.nested(k, self._settled())

    def _followed(self) -> Parts:
        """Return the parts for what holds the values by now."""
        self._parts = self._parts.followed()
        return self._parts

    def _bound(self) -> Parts:
        """Return the parts for the values that the last update was given."""
        self._parts = self._parts.bound()
        return self._parts

    # --- swapping ---------------------------------------------------------------------------------

    @property
    def is_swapped(self) -> bool:
        """Whether the averages are in the place of the weights."""
        return self._parts.exchange.swapped is not None

    def swap(self, k: int = 0) -> None:
        """Put averages in the place of the weights; called again, put the weights back, bit for bit.

        Contents are exchanged in place, without further memory. Where that cannot be (an average of another
        type than its weight, one that started at zeros or lies elsewhere, variables of TensorFlow and Keras),
        the weight is kept aside meanwhile, beside the average, and the average is left as it is.

        Args:
            k: Which averages, of several. Means nothing on the way back.

        Raises:
            TypeError: A value never changes, as JAX arrays. Evaluate with `averages` there.
            RuntimeError: A value is of another shape or type by now, FSDP holds the parameters gathered,
                averages of another EMA or thread are in the way, or values were replaced while averages were
                in their place.
            ValueError: A value is read-only, or shares memory with another. Nothing has changed then.
        """
        self.wait()
        self._bound().exchange.swap(k, self._settled())

    def swapped(self, k: int = 0) -> AbstractContextManager[None]:
        """Put averages in the weights' place within a ``with`` statement; each way out undoes it bit for bit.

        Where they are there already, nothing is done: the outermost block gives the weights back, or `swap`
        if that put averages there. After a `swap` within a block the weights are back at once, and its end
        changes nothing. Blocks of tasks that take turns in one thread may overlap: the weights are back after
        the last one.

        Args:
            k: Which averages, of several.

        Raises:
            RuntimeError: As for `swap`; or other averages of this EMA are in the place of the weights.

        Example:
            >>> import fastema, numpy as np
            >>> weight = np.zeros(2)
            >>> ema = fastema.EMA([weight], 0.5)
            >>> weight += 1.0
            >>> ema.update()
            >>> with ema.swapped():
            ...     print(weight)
            [0.5 0.5]
        """
        return Swapping(partial(self._enter, k), self._leave)

    def _enter(self, k: int, block: Block) -> None:
        self.wait()
        self._bound().exchange.enter(k, self._settled(), block)

    def _leave(self, block: Block) -> None:
        self._parts.exchange.leave(block)

    def copy_to(self, values: Nested | None = None, k: int = 0) -> Nested:
        """Write averages into values, for good.

        Args:
            values: Arrays (of any library) or a module, shaped as the values given at first. None: these.
            k: Which averages, of several.

        Returns:
            The values with the averages in their own types, shaped as they were given: the arrays
            themselves, or new ones where they never change (JAX).

        Raises:
            RuntimeError: Weights and averages are swapped.
            ValueError: Shapes differ, or an array is read-only. Nothing has changed then.

        Example:
            >>> import fastema, numpy as np
            >>> ema = fastema.EMA({"w": np.ones(2)})
            >>> ema.copy_to({"w": np.zeros(2)})
            {'w': array([1., 1.])}
        """
        self.wait()
        k = self._parts.averages.checked_index(k)
        parts = self._bound() if values is None else self._followed()
        return parts.exchange.copy_to(values, k, self._settled())

    def pull(self, amount: float = 1.0, k: int = 0) -> None:
        """Move the weights towards their averages, in place: ``value += amount * (average - value)``.

        Training goes on from there: Switch EMA (https://arxiv.org/abs/2402.09240) and Keras'
        ``ema_overwrite_frequency`` do it with 1.0 once in a while, Lookahead (https://arxiv.org/abs/1907.08610)
        at every step that averages. It is an update with the roles exchanged: with ``1 - (1 - amount)`` for
        the amount, in float32 for weights of 16 and 32 bits, rounded once to their type; 1.0 copies. What is
        copied and not averaged stays as it is; so do averages and counters.

        Args:
            amount: From 0 to 1, how far.
            k: Towards which averages, of several.

        Raises:
            RuntimeError: As for `update`, or FSDP holds the parameters gathered.
            TypeError: A value never changes, as JAX arrays; or it is of fewer bits than a float64 average.
            ValueError: A value is read-only, or lies elsewhere than its average. Nothing has changed then.

        Example:
            >>> import fastema, numpy as np
            >>> weight = np.zeros(2)
            >>> ema = fastema.EMA([weight], 0.5)
            >>> weight += 4.0
            >>> ema.update()
            >>> ema.pull(0.25)
            >>> weight
            array([3.5, 3.5])
        """
        amount = check_share(amount, "amount")
        self.wait()
        k = self._parts.averages.checked_index(k)
        self._bound().exchange.pull(amount, k, self._settled())

    def rebind(self, values: Nested) -> None:
        """Go on with other arrays in the place of the values: of the same names and shapes.

        After a model was moved (``model.to(...)``), cast (``model.half()``) or made anew. Averages keep their
        types, counters go on, and averages lie where the new values are. Where what was given holds other
        arrays of the same types and devices by now, calls find that by themselves.

        Args:
            values: As for `EMA`.

        Raises:
            RuntimeError: Averages are in the place of the weights.
            TypeError: A type cannot be averaged into what is kept.
            ValueError: Names or shapes differ. Nothing has changed then.

        Example:
            >>> import fastema, numpy as np
            >>> ema = fastema.EMA({"w": np.zeros(2)}, 0.5)
            >>> ema.rebind({"w": np.ones(2)})
            >>> ema.update()
            >>> ema.averages["w"]
            array([0.5, 0.5])
        """
        self.wait()
        self._parts.exchange.check_not_swapped("rebind()")
        self._parts = Parts.of(values, self._parts.options, self._parts, call="rebind()")

    # --- models -----------------------------------------------------------------------------------

    def module(self, k: int = 0) -> Any:
        """Return a torch module that computes with the averages and never trains: a teacher, a target.

        Its parameters lie in the memory of the averages: nothing is copied, and an update, `reset` and
        `load_state_dict` are in it at once. Its state dict has the names of the model's; what is loaded into
        it is loaded into the averages. It has the parts that the model has when this is called, is in
        evaluation mode for good (``train()`` of a module around it changes nothing), and no parameter
        requires a gradient.

        It computes in the type of the averages. Beside bfloat16 weights that is float32: bfloat16 arguments
        of its ``forward`` are cast to it, and what it returns is of it; ``torch.autocast`` makes it as
        fast as the model. Buffers are as the averages have them; those that no checkpoint holds are copied.
        What `only` leaves out and is not trained is the model's own.

        As long as it lives a swap keeps the weights aside, and exchanges nothing: it always computes with
        averages. `copy.deepcopy` makes a module of its own of it.

        Args:
            k: Which averages, of several.

        Raises:
            RuntimeError: Averages are in the place of the weights.
            TypeError: The values are no torch module, or it cannot be copied.
            ValueError: Averages are not kept as they are shown (``initial="zeros"``) or where the model is
                (``device="cpu"``), values are sharded, or `only` leaves out a parameter that is trained.

        Example:
            Self-distillation::

                ema = fastema.EMA(student, 0.996)
                teacher = ema.module()
                for batch in batches:
                    with torch.no_grad():
                        targets = teacher(batch)
                    distance(student(batch), targets).backward()
                    optimizer.step()
                    ema.update()
        """
        self._parts.exchange.check_not_swapped("module()")
        self.wait()
        parts = self._bound()
        k = parts.averages.checked_index(k)
        return parts.options.views.module(parts.values, parts.averages, k, self._settled())

    def model_state_dict(self) -> dict[str, Any]:
        """Return a copy of a torch module's state dict with averages in it, in the weights' own types.

        It is what ``module.state_dict()`` is inside `swapped`: tied weights, buffers, extra state and hooks
        are the module's own, and its ``load_state_dict`` takes it. Wrappers, as of DDP, are looked through.

        Raises:
            RuntimeError: As for `swap`.
            TypeError: The values are no module.

        Example:
            To keep the averages::

                torch.save(ema.model_state_dict(), "model.pt")
        """
        module = self._bound().values.module()
        if self.is_swapped:
            return copied_state(module)
        with self.swapped():
            return copied_state(module)
