# Sourced by bash: lets `"$python" -S SCRIPT` find this package and all that is installed beside it, but not upstream's lightning.
#
# Such a machine may have upstream's lightning installed, and our package refuses to run beside it. So Python runs without its
# own site-packages (-S), and finds links to everything in them but upstream in a folder made here.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

"$python" - "$site" <<'PY' || exit 1
import os
import re
import sys

upstream = re.compile(r"(lightning|pytorch_lightning)(-.*)?$", re.IGNORECASE)
folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
for folder in filter(os.path.isdir, folders):
    for name in os.listdir(folder):
        link = os.path.join(sys.argv[1], name)
        if not upstream.match(name) and not os.path.lexists(link):
            os.symlink(os.path.join(folder, name), link)
PY

export PYTHONPATH="$repository/src:$site" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
