"""Every number of an experiment, glossed once: HetLoRA as its paper runs it.

Other files here change some of these; flags (`--config.seed=1`) change any.
The comment above a field is what `--print_config` shows.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults, section by section."""
  c = ml_collections.ConfigDict()
  # Seed of everything random: people, batches, ranks, initialisation.
  c.seed = 0
  # Method, a row of hetlora_jax/methods/registry.py.
  c.method = 'hetlora'

  f = c.federated = ml_collections.ConfigDict()
  # Rounds of federated training.
  f.num_rounds = 20
  # People sampled a round, without replacement.
  f.clients_per_round = 10
  # How people are sampled: 'uniform', or 'by_size' of their data.
  f.sampling = 'uniform'
  # Optimizer steps a client takes in a round.
  f.local_steps = 5
  # Examples a step.
  f.local_batch = 8
  # Fewest steps: each client takes a random number up to local_steps; 0: all.
  f.min_local_steps = 0
  # Chance that a client trains and never reports.
  f.dropout = 0.0
  # Smallest rank; nobody prunes below it.
  f.r_min = 5
  # Largest rank, and the number of rank slots of every adapter.
  f.r_max = 50
  # Decay factor in (0, 1]: the tail is slots [gamma r, r). 1 never prunes.
  f.gamma = 0.99
  # Lambda, the weight of ||B_tail|| ||A_tail|| in a client's loss.
  f.tail_penalty = 0.1
  # Mu, the weight of ||theta - theta_received||^2 / 2 ('proximal').
  f.proximal = 0.01
  # Longest change that a client may send, in L2 over all it trained; 0: any.
  f.norm_bound = 0.0
  # Clients a device trains at once, the memory dial; 0 is all of its own.
  f.clients_at_once = 0
  # Rounds in one call of the compiled program; evaluations, checkpoints and
  # Ctrl-C wait for its end.
  f.rounds_per_call = 1

  r = c.ranks = ml_collections.ConfigDict()
  # Who gets which rank: 'uniform', 'power_law', 'normal', 'explicit', 'tiers'.
  r.distribution = 'power_law'
  # Exponent of the power law p(r) ~ r**-exponent on [r_min, r_max].
  r.exponent = 1.0
  # Ranks of person 0, 1, ..., repeated ('explicit').
  r.explicit = (5, 50)
  # Ranks of the device tiers ('tiers').
  r.tiers = (5, 20, 50)
  # Share of the people in each tier; sums to 1.
  r.tier_fractions = (0.6, 0.3, 0.1)
  # Correlation of rank with the number of examples, in [-1, 1].
  r.data_correlation = 0.0

  m = c.methods = ml_collections.ConfigDict()
  # What a client is sent; '' takes the method's rule, here and below.
  m.distribution = ''
  # What a client minimises.
  m.objective = ''
  # Which factors it trains, or the 'base' instead.
  m.trainable = ''
  # Which factors stay with the client: 'none', 'b' or 'both'.
  m.personal = ''
  # Which rank a client keeps after training.
  m.pruning = ''
  # How much each client counts.
  m.weighting = ''
  # How the clients' adapters become one.
  m.aggregation = ''
  # From the aggregate to the server's adapters.
  m.redistribution = ''
  # Clients train 'separate', or on their 'pooled' data as one.
  m.cohort = ''
  # Share of squared singular values (or slots) kept by rules of that name; 0
  # takes the method's.
  m.energy = 0.0
  # Examples that weigh a client: of its 'dataset', or trained on in a 'round'.
  m.count_examples = 'dataset'
  # Rounding of gamma r: 'floor', or 'nearest' (empty tails at small ranks).
  m.tail_rounding = 'floor'
  # One rank a 'client', or one a 'matrix'.
  m.prune_scope = 'client'
  # A tail must become smaller than the one 'received' or 'last_trained'.
  m.prune_against = 'received'
  # Whether a pruned rank holds in later rounds.
  m.keep_pruned_rank = True
  # Norm weights over the whole 'model', a 'layer', or a 'matrix'.
  m.weight_scope = 'model'
  # Share of a slot's owners cut off at each end ('trimmed_mean').
  m.trim = 0.1

  x = c.faults = ml_collections.ConfigDict()
  # Share of the people who multiply the change they send.
  x.malicious = 0.0
  # By what; inf makes it not finite, and they are left out.
  x.malicious_scale = 100.0

  lora = c.lora = ml_collections.ConfigDict()
  # Adapted matrices: any of q, k, v, o, gate, up, down.
  lora.targets = ('q', 'v')
  # LoRA scale (or alpha, under the other rules): delta W = scale A B.
  lora.scale = 2.0
  # 'constant', 'alpha_over_r' or 'alpha_over_sqrt_r'.
  lora.scale_rule = 'constant'
  # Whether averaged factors take up sqrt(scale) of each client's scale.
  lora.fold_scale = False
  # How A is drawn: 'gaussian' or 'kaiming_uniform'; B starts at zero.
  lora.init = 'gaussian'
  # PEFT folder with the adapters to start from, of any rank up to r_max.
  lora.from_peft = ''

  o = c.client_optimizer = ml_collections.ConfigDict()
  # 'adam', 'adamw' or 'sgd'; moments start afresh every round.
  o.name = 'adam'
  # Learning rate of the clients.
  o.learning_rate = 1e-3
  # Learning rate of clients that train the base (full fine-tuning).
  o.full_learning_rate = 1e-5
  # Decoupled weight decay ('adamw' only).
  o.weight_decay = 0.0

  o = c.server_optimizer = ml_collections.ConfigDict()
  # 'sgd', 'momentum', 'adam' or 'yogi' on the pseudo-gradient.
  o.name = 'sgd'
  # Learning rate of the server; sgd at 1.0 takes the aggregate as it is.
  o.learning_rate = 1.0

  m = c.model = ml_collections.ConfigDict()
  # 'gemma3_270m', 'smollm2_135m', a .gguf, a Hugging Face folder, 'random', or
  # 'random:gemma3_1b': random weights in a published shape (models/shapes.py).
  m.source = 'gemma3_270m'
  # 'float32', 'bfloat16', or 'auto': what this machine multiplies fastest.
  m.dtype = 'auto'
  # Recompute all of a layer in the backward pass, products too: least memory.
  m.remat = False
  # Shape of a model that is just 'random', of the Gemma 3 family.
  x = m.random = ml_collections.ConfigDict()
  # Seed of its parameters.
  x.seed = 0
  # Width of the residual stream.
  x.width = 64
  # Number of layers.
  x.num_layers = 2
  # Query heads; half as many key-value heads.
  x.num_heads = 4
  # Width of a head.
  x.head_dim = 16
  # Hidden width of the MLP.
  x.mlp_width = 128
  # Words of the tokenizer that is trained on the data.
  x.vocab_size = 384

  d = c.data = ml_collections.ConfigDict()
  # Data set: 'chitchat', 'mail_subject', 'multi_session_chat', 'reddit_tldr',
  # 'synthetic', or 'text_folder': your own data (docs/data.md).
  d.name = 'chitchat'
  # File or folder of your data, or of a data set that you downloaded.
  d.path = ''
  # Who the clients are: 'natural' (who wrote it), or made by a rule from all
  # examples: 'iid', 'dirichlet', 'by_size', 'pathological'.
  d.partition = 'natural'
  # Clients that such a rule makes.
  d.partition_clients = 100
  # Its number: of 'dirichlet' the concentration, of 'by_size' the exponent of
  # the power law, of 'pathological' the shards of one label that a client gets.
  d.partition_alpha = 1.0
  # Its seed, so that clients are the same for every `seed`.
  d.partition_seed = 0
  # People with fewer examples are left out.
  d.min_examples = 20
  # People who may be trained on, the same for every seed; 0 is all.
  d.num_people = 0
  # Clients that each of them stands for, with the same turns, but ranks and
  # draws of their own: a population larger than the data set.
  d.copies = 1
  # Share of the people that is never trained on.
  d.unseen_fraction = 0.2
  # Share of a person's examples, the latest, kept for evaluation.
  d.heldout_fraction = 0.2
  # Turns of context before the target, at most 4.
  d.context_turns = 4
  # Tokens of a packed row.
  d.row_tokens = 256
  # Room for tokens, times local_batch; longer contexts lose their start, texts
  # that are summed up their end.
  d.tokens_per_example = 96
  # Room for target tokens, times local_batch; longer targets lose their end.
  d.targets_per_example = 32

  e = c.eval = ml_collections.ConfigDict()
  # Rounds between evaluations; 0 evaluates at the start and the end only.
  e.every = 10
  # People evaluated, of those seen and of those unseen each.
  e.num_people = 32
  # Examples of each.
  e.examples_per_person = 4
  # Also give seen people the adapter truncated to their own rank.
  e.own_rank = False

  k = c.checkpoint = ml_collections.ConfigDict()
  # Rounds between checkpoints; the last round is always saved.
  k.every = 10
  # Newest checkpoints kept.
  k.keep = 2
  # Checkpoints of rounds that it divides are kept for ever; 0: none.
  k.keep_every = 0

  w = c.communication = ml_collections.ConfigDict()
  # Type of parameters on the wire: float32, bfloat16, float16 or int8.
  w.wire_dtype = 'float32'

  x = c.mesh = ml_collections.ConfigDict()
  # Points of a sweep that a device trains at once, the others wait; 0 is all of
  # its own. 1 needs the memory of one run and gives each point its very numbers.
  x.points_at_once = 1
  # Devices along which the points of a sweep are spread.
  x.sweep = 1
  # Devices along which clients are spread.
  x.clients = 1
  # Devices along which the base model is split.
  x.model = 1
  return c.lock()
