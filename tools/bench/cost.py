"""What a piece of work costs: time, and memory of this process."""

import ctypes
import gc
import sys
import threading
import time

import psutil

INTERVAL = 0.005  # seconds between two looks at the memory


class Cost:
    """Measures the work in a `with` block.

    seconds: of wall clock.
    peak_mb: growth of the process's resident memory from the start of the block to its highest point, in 10^6 bytes. It
        holds all that the work allocates, results included, and whatever the allocator does not give back at once.
    """

    def __enter__(self) -> "Cost":
        gc.collect()
        if sys.platform == "linux":  # freed memory that glibc still holds would hide what is allocated next
            ctypes.CDLL(None).malloc_trim(0)
        self._process = psutil.Process()
        self._start = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._done.set()
        self._watcher.join()
        self.peak_mb = (self._highest - self._start) / 1e6

    def _watch(self) -> None:
        while True:
            self._highest = max(self._highest, self._process.memory_info().rss)
            if self._done.wait(INTERVAL):
                break
