"""Set up what the documents need, and build them as a site in build/site: it asks for nothing from elsewhere.

python3 scripts/docs.py            builds, and fails at a link that leads nowhere
python3 scripts/docs.py --serve    builds, shows the site at http://127.0.0.1:8200/, and builds again what changes
"""

from __future__ import annotations

import os
import sys

from environment import ROOT, explain_if_asked, prepare, run

ADDRESS = "127.0.0.1:8200"


def main() -> None:
    """Build the site, and serve it if asked to."""
    given = sys.argv[1:]
    explain_if_asked(__doc__)
    if given not in ([], ["--serve"]):
        sys.exit(f"usage: python3 scripts/docs.py [--serve], not {' '.join(given)}")
    # An environment of its own: it takes seconds, as it has no torch.
    programs = prepare("docs", ROOT / ".venv-docs", weights=False)
    mkdocs = [str(programs / "python"), "-m", "mkdocs"]
    # The theme tells of its successor at every build.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    if given:
        run([*mkdocs, "serve", "--dev-addr", ADDRESS], cwd=ROOT, env=environment)
    else:
        run([*mkdocs, "build", "--strict"], cwd=ROOT, env=environment)
        print(f"built: {ROOT / 'build' / 'site' / 'index.html'}")


if __name__ == "__main__":
    main()
