"""What the multi-token-prediction layer (DeepSeek-V3, arXiv:2412.19437, section 2.2) runs after a step. Decides
nothing.

At position p it joins the model's last hidden row of p with the embedding of the token at p + 1, and says what it
expects at p + 2. So it runs behind the model: once a step has chosen its tokens, over the positions whose next token is
known now. It has a layer of the cache of its own. In pages that two requests share, the last row of the shared
beginning is that of the first one's next token: that costs acceptance now and then, never text.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from brigade.core.scheduler import Slice, StepPlan
from brigade.model.batch import Batch, build
from brigade.model.sampling import History


def following(batch: Batch, page: int, histories: Mapping[int, History]) -> tuple[Batch, Tensor | None]:
    """The same positions with the tokens one further on, without those after a guess that was wrong; and which rows of
    `batch` they are, None where they are all. Its sampled rows are those after which a token is to be guessed."""
    slices, rows = list[Slice](), list[int]()
    for row, s in batch.slices:
        tokens = histories[s.rid].tokens(s.start + 1, s.end + 1)
        slices.append(Slice(s.rid, tuple(tokens), s.start, s.pages, s.sample, s.prompt_end))
        rows += range(row, row + len(tokens))
    ahead = build(StepPlan(tuple(slices)), page, {}, wrote=batch.wrote)
    return ahead, None if len(rows) == len(batch.ids_T) else torch.tensor(rows)
