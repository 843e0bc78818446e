"""`python -m engram_interp`: the command line without an installed script, as torchrun starts it."""

import os
import sys

from engram_interp.cli import main

try:
    main()
except SystemExit as ended:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise
    # A rank's work is on disk here. One was seen to abort after it ("terminate called without an active exception", as when
    # a native thread wakes while the interpreter is taken down), for which torchrun fails the whole run.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
