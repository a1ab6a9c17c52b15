"""What all pictures of the course share: their look, and how they are saved."""

from plumbing.errors import InputError

# light to dark, so that the pictures can be read in grey
SHADES = ("#ffffff", "#c9d6e8", "#7f9fc6", "#2f4b7c")
DARK, MIDDLE, LIGHT = SHADES[3], SHADES[2], SHADES[1]
ACCENT = "#d1495b"


def figure(width, height, rows=1, columns=1, **options):
    """A figure of so many inches, and its axes"""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "pictures need matplotlib, which is not installed: pip install -r requirements-dev.txt"
        ) from None
    matplotlib.rcParams.update({
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    })
    fig = Figure(figsize=(width, height))
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def grid(ax, title, xlabel, ylabel):
    """Axes on which a matrix is drawn: a closed frame, no tick marks"""
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.tick_params(length=0)
    for side in ("top", "right"):
        ax.spines[side].set_visible(True)


def save(fig, path):
    fig.tight_layout()
    fig.savefig(path, dpi=100, metadata={"Software": None})
