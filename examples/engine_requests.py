# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The requests of `engine.py`: what was asked for, and how it goes on, as ``generate`` has it."""

import dataclasses

import torch


@dataclasses.dataclass(eq=False)
class Request:
    """What was asked for, and what there is of it: ``sequences``, one or those of a beam search,
    the best one first; the beams that have ended, as (score, tokens); and the ``result``, if there
    is one."""

    name: object
    prompt: list
    max_new_tokens: int
    num_beams: int

    def begin(self, tables):
        """Begin, or begin anew; returns how many tokens the cache has already."""
        self.sequences, self.new_tokens, self.scores = [(self.name, 0)], 0, [0.0]
        self.finished, self.result = [], None
        return tables.add(self.sequences[0], self.prompt)

    def go_on(self, tables, rows, best, logits, ends):
        """Append what follows. Of each sequence ``rows`` tells where its likeliest token is in
        ``best``, and its row in ``logits``."""
        self.new_tokens += 1
        if self.num_beams > 1:
            self._search(tables, logits[[rows[one] for one in self.sequences]].float(), ends)
            return
        (sequence,) = self.sequences
        token = best[rows[sequence]]
        tables.append(sequence, token)
        if token in ends or self.new_tokens == self.max_new_tokens:
            self.result = tables.tokens(sequence)

    def _search(self, tables, logits, ends):
        """A step of a beam search: which beams go on, with which tokens. Beams that have ended
        compete by their scores over their numbers of new tokens."""
        beams, scores = self.num_beams, logits.log_softmax(-1)
        scores += torch.tensor(self.scores, device=logits.device)[:, None]
        scores, places = scores.flatten().topk((1 + max(len(ends), 1)) * beams)
        going_on = []
        for rank, (score, place) in enumerate(zip(scores.tolist(), places.tolist())):
            at, token = divmod(place, logits.shape[1])
            parent = self.sequences[at]
            if token not in ends and self.new_tokens < self.max_new_tokens:
                going_on.append((score, parent, token))
            elif rank < beams:
                ended = [*tables.tokens(parent), token]
                self.finished.append((score / self.new_tokens, ended))
        self.finished = sorted(self.finished, reverse=True)[:beams]
        going_on, full = going_on[:beams], len(self.finished) == beams
        if not going_on or (full and going_on[0][0] / self.new_tokens <= self.finished[-1][0]):
            self.result = self.finished[0][1]
            return
        self.scores, parents, tokens = zip(*going_on)
        self.sequences = [(self.name, beam) for beam in range(beams)]
        tables.reorder(self.sequences, parents)
        for sequence, token in zip(self.sequences, tokens):
            tables.append(sequence, token)


def random_requests():
    """(Prompt, new tokens, beams); some prompts begin alike."""
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in (5, 70, 33, 1, 100, 18)]
    shared = torch.randint(3, 512, (40,)).tolist()
    prompts += [shared + prompt[:9] for prompt in prompts[:3]]
    return [(prompt, 24, 1 + 2 * (n % 3 == 1)) for n, prompt in enumerate(prompts)]
