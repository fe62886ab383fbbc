"""What `loraq --help` and `loraq COMMAND --help` say."""

from __future__ import annotations

OVERRIDES = """\
overrides are KEY=VALUE in Hydra's syntax:
  experiment=demo | table1              a list of rows with a table (conf/experiment/)
  method=rtn | lqer | loftq | svdquant | loraq_o1 | loraq_o2 | loraq_best | reference …
  model=tiny_pixart | tiny_sana | pixart_sigma | sana_1_6b   or model.path=FOLDER, your own
  transform=none | shift | hadamard64   instead of the method's own rotation and shift
  format@quant.weight=mxfp4_e2m1        also .activation, .branch_weight, .branch_activation
  quant.branch.rank=16                  or quant.branch.budget=0.64 (bits per weight)
  data.count=16  generate.batch_size=4  metrics=paired  tracking=disabled  output=FOLDER
  data=file data.captions=FILE.txt      prompts of your own, one a line
      calibration.captions=asset:captions.json   and what calibrated methods read beside them
  quant.branch.kind=FILE.py             your own way to find L and R (README, "Your own method")
All settings with their defaults: conf/config.yaml and its groups.

examples:
  loraq run experiment=demo
  loraq run experiment=table1 --dry-run
  loraq run experiment=table1 row=rtn --cfg job
  loraq run method=loraq_o2 format@quant.branch_weight=int4 data.count=16
  loraq quantize method=svdquant transform=hadamard64
"""

COMMANDS = {
    "run": "the whole experiment: quantise, generate, measure, table (resumes; cached parts stay)",
    "sweep": "many runs: here, on Slurm or on Ray; an experiment's rows, or every A,B of overrides",
    "quantize": "only quantise the rows, keep the packed layers",
    "generate": "only make the images (quantises what is missing)",
    "evaluate": "only measure: like run, and the same records",
    "fit": "try the last row with one and two images, and say which batch fits into memory",
    "score": "measure a saved pipeline (it makes its images) or any folder of images",
    "fetch": "download a published set of prompts and images into a folder (resumes)",
    "report": "write one HTML page of an experiment: tables, diagrams, images, configurations",
    "tables": "print and rewrite the tables of the records that are there",
    "cache": "list what lies under the output folder, verify or remove it",
}

PLANNED = ("run", "quantize", "generate", "evaluate")

SCORE = """\
examples:
  loraq score packed_pipeline data.count=32
  loraq score outputs/images/0123456789abcdef --against outputs/images/fedcba9876543210
  loraq score my_images data.captions=captions.json data.split=test data.real=null metrics=paired \\
      --against my_reference --json scores.json
An image is called NAME.png after its caption's name. With a pipeline, model.* says how it samples.
"""
SWEEP = """\
examples:
  loraq sweep experiment=table1                                    one job a row, here
  loraq sweep experiment=table1 hydra/launcher=slurm hydra.launcher.partition=gpu
  loraq sweep method=rtn,loraq_o2 quant.branch.budget=0.32,0.64 hydra/launcher=ray
  loraq sweep --status outputs/sweeps/ID      how the jobs ended
  loraq sweep --again outputs/sweeps/ID       only those that failed or were lost
Jobs share products: what several want is made once. python -m loraq.run --multirun is the same.
"""
FETCH = """\
A folder that another machine filled serves as well. Then:
  loraq run model=pixart_sigma data=mjhq data.captions=FOLDER
Interrupted, the same command goes on where it stopped; run again, it checks every file's sha256.
"""
EPILOGS = dict.fromkeys((*PLANNED, "fit"), OVERRIDES) | {
    "score": SCORE,
    "fetch": FETCH,
    "sweep": SWEEP,
}
