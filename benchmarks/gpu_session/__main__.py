import sys

from benchmarks.gpu_session.session import main

sys.exit(main())
