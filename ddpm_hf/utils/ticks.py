"""Ticks of matplotlib's charts that anyone can read."""

import numpy as np


def plain_ticks(*axes) -> None:
    """Label the ticks of each x or y axis with plain numbers, without powers, offsets and factors.

    Call it after the values are drawn, because a logarithmic axis has more labels the fewer decades it spans.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # slow to import

    for axis in axes:
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            subs = range(1, 10) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: np.format_float_positional(value, 9, fractional=False, trim="-"))
        )
