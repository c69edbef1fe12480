#!/usr/bin/env bash
# Starts the KVPO run, however it is called; launch/README.md has the table:
#
#     torchrun --nproc_per_node 8 launch/pretrain_kvpo.sh RECIPE [section.key=value ...]
#     bash launch/pretrain_kvpo.sh RECIPE [--topology NAME_OR_FILE] [section.key=value ...]
#     srun ... launch/pretrain_kvpo.sh RECIPE ...      sbatch launch/slurm.sbatch RECIPE ...
#
# torchrun hands a file to Python, whatever its name; bash, srun and sbatch hand it to bash. So this one is
# both. To bash the next line is the command ":", which does nothing; then comes a script, whose exec never
# returns, and all Python below it is the text of a here-document. To Python the same line opens a string in
# three quotes, which ends where the here-document begins; the document's end is a comment. Bash's part must
# hold no backslash and no three quotes.
''':'
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-$root/.venv/bin/python}" || command -v python3)
exec "$python" "$root/launch/pretrain_kvpo.sh" "$@"
: <<'#PYTHON_ENDS'
'''

import sys
from pathlib import Path

if __name__ == "__main__":  # data workers import this file under another name
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tools.launching import main

    main(__file__)
#PYTHON_ENDS
