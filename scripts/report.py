"""Tables, figures and paired comparisons of the runs below a directory; see docs/reports.md.

python scripts/report.py RESULTS_DIR [--output DIR]
python scripts/report.py --paired RESULTS_DIR
python scripts/report.py --paired RUN_A RUN_B
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python looks for modules beside the program that it starts. They are one folder up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from reports.command import main

    sys.exit(main())
