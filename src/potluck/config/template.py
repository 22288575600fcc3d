"""The commented experiment file that `potluck init` writes."""

TEMPLATE = """\
# A Potluck experiment. Train it with    potluck train FILE
# A line that is commented out shows a key with its default, or one that this experiment
# does not need.

name = "my-experiment"        # runs go to runs/<name>/seed-<seed>/

[task]
data = "digits"               # digits, pythonlib (both need no download), mnist, wisdm,
                              # shakespeare, folder, table or text; devices: with
                              # `serve` alone
model = "2nn"                 # logistic, 2nn or cnn (cnn: images only); for text char-lstm, or
                              # char-lstm-peephole, the paper's to the last parameter
# variant = "paper"           # shakespeare: clean (the default), or with the publisher's notices
# hidden = 256                # char-lstm: the width of its layers
# loss = "per-step"           # text: per-character (the default), or averaged over padding too
# batches = "random"          # text: by-length (the default: lines of a length share a batch)
# path = "my-data"            # folder: one .npz, .csv or .parquet a client; table: one file;
                              # text: a folder of one .txt a client, or a table
# client_column = "client"    # table: who owns a row
# text_column = "text"        # text in a table
# symbols = "characters"      # text: bytes (the default), or the characters that occur
# steps = 80                  # text: symbols in a row; a longer line goes on in the next one
# target_column = "target"    # folder and table: what is to be predicted
# kind = "regression"         # folder and table: what targets are, classes, regression or
                              # multilabel; whole numbers that could be either are refused without
# missing = "mean"            # mean, median or a number, over all clients; refused if left out
# scale = "standard"          # none (the default), standard, minmax; pixels divides by 255
# categories = "one-hot"      # of columns of text: one-hot or codes; refused if left out
# split = "shuffled"          # test examples: shuffled (the default: of each class its share),
                              # last, time:COLUMN (the latest) or group:COLUMN (whole groups)
# test_fraction = 0.2         # of a client's examples

[partition]                   # how the training examples are divided among clients
kind = "iid"                  # iid: shuffled and dealt; shards: sorted by label, a few blocks
                              # each; dirichlet: label mixtures; unbalanced: iid, unequal sizes;
                              # writer (mnist), user (wisdm), role (shakespeare) and module
                              # (pythonlib): natural owners;
                              # own: folder and table come divided
clients = 100
# shards_per_client = 2       # shards only; fewer is more skewed
# alpha = 0.5                 # dirichlet only; smaller is more skewed
# sigma = 1.0                 # unbalanced only; larger is more unequal
# seed = 0                    # of the division, and of own test examples; the run has its own

[algorithm]
name = "fedavg"               # fedavg; fedsgd: one step on all of a client's examples;
                              # fedprox: clients stay near the model; scaffold: clients correct
                              # their drift, at twice the bytes
client_lr = 0.2               # the local learning rate; tune it first
local_epochs = 5              # E: passes over a client's examples in a round
batch_size = 10               # B: examples a local step, or "full"
# gradient_clip = 1.0             # the largest norm of a local step's gradient; none if left out
# mu = 0.01                   # fedprox only, which needs it: how near

# [algorithm.server]          # what the server does with the mean update
# name = "average"            # average; momentum or nesterov (FedAvgM); adagrad, adam or yogi
# server_lr = 1.0             # adagrad, adam and yogi need it: start with 0.01
# momentum = 0.9              # momentum and nesterov only
# beta1 = 0.9                 # adam and yogi only
# beta2 = 0.99                # adam and yogi only
# tau = 0.001                 # adagrad, adam and yogi only: smaller updates move in proportion

# [algorithm.client_optimizer] # fedavg and fedprox: what moves a client's weights, as torch.optim
# name = "sgd"                # sgd: plain steps (the default); momentum, nesterov, adam or adamw
# weight_decay = 0.0          # adamw has 0.01 if left out
# momentum = 0.9              # momentum and nesterov only
# beta1 = 0.9                 # adam and adamw only, as the two below
# beta2 = 0.999
# eps = 1e-8

# [algorithm.client_schedule] # a factor on client_lr in each round; constant if left out
# name = "cosine"             # cosine or linear: rounds, floor; exponential: decay;
                              # step: every, factor; warmup: rounds, then
# rounds = 200
# floor = 0.0

# [algorithm.server_schedule] # the same for the server's rate
# name = "warmup"
# rounds = 5
# then = { name = "exponential", decay = 0.99 }

[run]
rounds = 200                  # at most
cohort = 0.1                  # clients in a round: a fraction (0.1; 0.0 is one client) or a count
target = 0.95                 # test accuracy to count the rounds to; without accuracies a loss to
                              # come down to; or {metric = "loss", at_most = 2.0}, or at_least
stop_at_target = true
# seed = 0                    # of weights, cohorts and batches; --seeds 3 runs 0, 1 and 2
# codec = "int8"              # in which updates travel, with `train` and with `serve`: float32 (the
                              # default); bfloat16, int8 and int4 are shorter and lose a little
# evaluate_every = 1          # rounds
# evaluate_train = 5000       # the model's loss on so many training examples too
# executor = "workers"        # workers: a process per core; loop: one process; vmap: a cohort as
                              # one program, for small models; ray: workers on many machines;
                              # auto: times the first three and chooses
# workers = 2                 # number of processes; all cores if left out, with vmap one; more
                              # on a GPU are shared out among the GPUs
# device = "cuda"             # vmap and auto: cpu, cuda, cuda:1, or auto, a GPU if there is one;
                              # left out, vmap takes the cpu and auto a GPU if there is one;
                              # ray: cpu, or cuda for workers with GPUs
# precision = "bf16"          # of local training: float32 (the default); bf16 rounds more and is
                              # faster on a GPU (vmap) and on processors that have it (loop,
                              # workers, ray); tf32, on a GPU alone, lies between the two
# ray_address = "auto"        # a Ray cluster that runs; one on this machine if left out
# ray_local = "auto"          # how its workers train: loop (one client after another, to the bits
                              # of loop), vmap (side by side), or auto, the faster of the two
# ray_gpus = 1.0              # GPUs of each worker, with device = "cuda"; 0.25: four on one GPU
# skip_failures = false       # true: leave a client that fails out of its round and go on

# [devices]                   # simulated devices: rounds take virtual time (docs/virtual-time.md)
# profile = "phones"          # ideal, hospitals, phones or browsers
# trace = "devices.csv"       # or a file with a line for every window of every device
# trace_days = 1              # after so many its windows come again
# examples_per_second = 100.0 # local training of this model on the middle device: measure it
# utc_offsets = [0.0]         # the time zones of the devices
# start_hour = 0.0            # UTC, at the beginning of the run
# selection = "open"          # this key and minimum, over_selection, selection_seconds,
                              # report_seconds, lease_seconds, pace_seconds and attempts are those
                              # of [server]; after so many attempts the run stops

# [server]                    # for `potluck serve`; `train` passes over it
# selection = "open"          # open: whoever comes; sampled: the cohorts of the simulation
# goal = 20                   # reports that close a round; left out, the cohort: a fraction is
                              # one of the devices that are enrolled when a round opens
# minimum = 0.8               # part of the goal without which a round is abandoned
# over_selection = 1.3        # devices selected, times the goal
# population = 1              # devices that must have enrolled before the first round; left out,
                              # the minimum of a goal that is a count
# selection_seconds = 120.0   # from the first device on
# report_seconds = 600.0      # from the end of the selection on
# lease_seconds = 600.0       # how long a device may be silent
# pace_seconds = 10.0         # at most; over it waiting devices come back
# attempts = 3                # abandoned in a row, then the run is paused
# federated_every = 0         # rounds between evaluations on the devices; 0: never
# max_weight = 1e6            # of one report
# max_norm = 1e4              # of one update
# max_weight_times = 5.0      # medians of its round that a weight counts for; 1e9: as it is
# max_pull_times = 2.0        # the same of weight times norm
# needs_charging = false
# needs_idle = false
# needs_unmetered = false
# needs_memory_bytes = 0
# test = "test.csv"           # evaluate on all of this file; left out, on the data's test examples
# long_poll_seconds = 25.0    # how long a check-in waits for work
"""
