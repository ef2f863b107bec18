"""`optvq train` several times in one process: the flags of every run, as JSON, are its argument."""

import json
import sys

from accelerate.state import AcceleratorState, PartialState

from optvq_hf.commands.train import main


PartialState.destroy_process_group = lambda self, group=None: None  # the next run is of the same group
for words in json.loads(sys.argv[1]):
    main(words)
    AcceleratorState._reset_state()
