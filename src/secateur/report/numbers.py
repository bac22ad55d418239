"""How numbers are written: few digits in prose, every digit in tables, always a unit."""

from __future__ import annotations

import math

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NUMBER_WORDS = (
    (1 / 4, "a quarter"),
    (1 / 3, "a third"),
    (1 / 2, "half"),
    (2 / 3, "two thirds"),
    (3 / 4, "three quarters"),
)


def count(n: int) -> str:
    """134,515,008."""
    return f"{n:,}"


def short(n: float, unit: str = "") -> str:
    """134.5 M, 538.1 MB: three to four digits with a decimal prefix."""
    for size, prefix in UNITS:
        if abs(n) >= size * 0.9995:
            return f"{n / size:.{_digits(n / size)}f} {prefix}{unit}"
    whole = f"{n:.{_digits(n)}f}" if n != int(n) else f"{int(n)}"
    return f"{whole} {unit}".rstrip()


def quantity(n: float, unit: str) -> str:
    """A number in the unit it is stored in: bytes, parameters, macs or seconds."""
    match unit:
        case "bytes":
            return short(n, "B")
        case "seconds":
            return seconds(n)
        case "macs":
            return short(n, "MAC")
        case _:
            return short(n)


def perplexity(value: float) -> str:
    """25.17; 41.0 keeps two digits after the point; thousands lose them; overflow says so."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞"
    if value >= 1e6:
        return short(value)
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def percent(share: float, digits: int = 1) -> str:
    """Share as a percentage: 50 %, 37.5 %; whole numbers lose their zeros."""
    if not math.isfinite(share):
        return "∞ %" if share > 0 else "not a number"
    text = f"{share * 100:.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{'0' if text == '-0' else text} %"


def change(before: float, after: float) -> str:
    """The change in percent, signed, with a true minus: −18.4 %, +2 %."""
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return "—"
    share = after / before - 1
    text = percent(abs(share), 1 if abs(share) < 9.995 else 0)
    if text == "0 %":
        return "unchanged" if before == after else "±0 %"
    return ("+" if share > 0 else "−") + text


def times(ratio: float) -> str:
    """×1.63."""
    if not math.isfinite(ratio):
        return "×∞"
    return f"×{ratio:.2f}" if ratio < 100 else f"×{ratio:,.0f}"


def seconds(value: float) -> str:
    """12.4 ms, 3.21 s, 4 min 05 s, 1 h 12 min."""
    if value < 1e-3:
        return f"{value * 1e6:.{_digits(value * 1e6)}f} µs"
    if value < 1:
        return f"{value * 1e3:.{_digits(value * 1e3)}f} ms"
    if value < 60:
        return f"{value:.{_digits(value)}f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def fraction(share: float) -> str:
    """A share in words where words are exact to a twentieth of a percent, else in percent: half, 37.5 %."""
    for value, word in NUMBER_WORDS:
        if abs(share - value) < 5e-4:
            return word
    return percent(share)


def _digits(n: float) -> int:
    """Digits after the point that leave three to four in all."""
    size = abs(n)
    return 2 if size < 9.995 else 1 if size < 999.5 else 0
