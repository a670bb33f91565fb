"""What processes of `warm` need not import again."""

import gc

import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import scipy.optimize  # noqa: F401
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama
import transformers.models.vit.modeling_vit

import peft_composition.cli  # noqa: F401
from peft_composition import *  # noqa: F403

from . import kills, tiny  # noqa: F401


transformers.Trainer  # what transformers imports when it is asked for  # noqa: B018
torch.set_num_threads(1)
gc.collect()
gc.freeze()  # children need not look through it, and share its memory
