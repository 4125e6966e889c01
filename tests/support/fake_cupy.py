"""What `_driver.Driver` asks of CuPy, as CUDA's rules have it: contexts of threads, memory, captures.

Below `fake_cuda.Driver`, which takes the driver's own place: this is for what the driver itself decides.
"""

import itertools
import threading
from types import SimpleNamespace


class CudaError(RuntimeError):
    """What CUDA refuses."""


class _Thread(threading.local):
    device = 0  # the one that the runtime takes where no context is current
    context = 0


class CuPy:
    """A machine with devices.

    Attributes:
        contexts: The devices that have a context.
        log: What was asked for, in order.
        free: How many bytes the devices have.
        pooled: How many bytes CuPy's pool holds without a use for them.
        capturing: The handles of streams that are captured.
    """

    def __init__(self, devices=2):
        self.contexts, self.log, self.free, self.capturing = set(), [], 1 << 30, set()
        self._thread, self._addresses, self._sizes = _Thread(), itertools.count(4096, 4096), {}
        self._devices = devices
        self.pooled = 0
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                **{name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
            ),
            driver=SimpleNamespace(
                ctxGetCurrent=lambda: self._thread.context,
                ctxSetCurrent=lambda context: setattr(self._thread, "context", context),
                launchKernel=self._launch,
            ),
        )

    # --- devices and contexts: the handle of a device's is its number plus 100 ------------------------

    def getDeviceCount(self):  # noqa: N802 - CUDA's name, as all below
        return self._devices

    def getDevice(self):  # noqa: N802
        return self._thread.context - 100 if self._thread.context else self._thread.device

    def setDevice(self, device):  # noqa: N802
        self.contexts.add(device)
        self._thread.device, self._thread.context = device, device + 100

    def _bound(self):
        if not self._thread.context:  # the runtime makes one
            self.setDevice(self._thread.device)
        return self._thread.context - 100

    def _launch(self, *arguments):
        if not self._thread.context:  # the driver does not
            raise CudaError("CUDA_ERROR_INVALID_CONTEXT")
        self.log.append(("launch", self.getDevice(), *arguments))

    def streamIsCapturing(self, stream):  # noqa: N802
        if stream in (0, 1) and self.capturing:
            raise CudaError("cudaErrorStreamCaptureImplicit")
        return stream in self.capturing

    # --- memory -----------------------------------------------------------------------------------

    def get_default_memory_pool(self):
        def free_all_blocks():
            self.free, self.pooled = self.free + self.pooled, 0

        return SimpleNamespace(free_all_blocks=free_all_blocks)

    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = range(1, 4)  # noqa: N815

    def mallocAsync(self, size, stream):  # noqa: N802
        device = self._bound()
        if size > self.free:
            raise CudaError("cudaErrorMemoryAllocation: out of memory")
        self.free -= size
        address = next(self._addresses)
        self._sizes[address] = size
        self.log.append(("malloc", device, size, stream))
        return address

    def freeAsync(self, address, stream):  # noqa: N802
        self.free += self._sizes.pop(address)
        self.log.append(("free", self._bound(), address, stream))

    def memcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        self.log.append(("copy", self._bound(), target, source, size, kind, stream))
