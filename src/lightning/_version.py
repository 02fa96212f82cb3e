"""The version, and the check that no other distribution owns the same import package."""

from importlib import metadata

KERAUNOS_VERSION = "0.1.0"
# Packages that build on Lightning compare this against the release whose behaviour they rely on.
__version__ = f"2.6.6+keraunos.{KERAUNOS_VERSION}"


def refuse_mixture() -> None:
    """Refuse to run where upstream's ``lightning`` is installed too: both own the directory ``lightning/``.

    Raises:
        ImportError: if a distribution named ``lightning`` is installed in this environment.
    """
    try:
        other = metadata.distribution("lightning")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"Keraunos {KERAUNOS_VERSION} and the distribution 'lightning' {other.version} (at {other.locate_file('')}) both "
        "provide the import package 'lightning', and a mixture of the two would give wrong results. Keep one: "
        "'pip uninstall lightning keraunos', then 'pip install keraunos'."
    )
