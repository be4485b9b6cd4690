"""What this process has taken of the machine's memory."""

from __future__ import annotations

import psutil


def peak_rss_mb() -> int:
    """Largest resident memory of this process so far, in MB, mapped file pages included."""
    memory = psutil.Process().memory_info()
    with open("/proc/self/status", encoding="ascii") as status:  # psutil has no peak on Linux
        peak_kb = next((int(line.split()[1]) for line in status if line.startswith("VmHWM")), memory.rss // 1024)
    return round(peak_kb * 1024 / 1e6)
