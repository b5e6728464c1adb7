# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What `engine.py` runs: stock models of Hugging Face's transformers, with rotary embeddings,
attention and all that keys and values need done over the pages of a `PagedKVCache`.

Weights and most modules are the model's own; where transformers' modules are many small kernels, in
norms and gates, there are functions of torch instead. Attention is in shards: parts of all layers'
heads, each with a cache of its own. Mostly there is one, of all heads. Where other processes have
the other shards, torch.distributed adds up what comes of them.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

import cupy_cache as cc


class Model:
    """A stock model, as the engine sees it. ``forward`` turns the arrays of a step into the hidden
    states of its tokens, [num_tokens, hidden].

    Parameters
    ----------
    model : transformers.PreTrainedModel
    max_length : int
        Of a sequence.
    fuse
        ``torch.compile``, for fewer kernels; then the first steps take some seconds.
    shards, num_shards
        Which shards of the heads this process has, of how many. See `engine_ranks.py`.
    """

    def __init__(self, model, max_length, *, fuse=lambda f: f, shards=(0,), num_shards=1):
        self.model, self.device, self.head = model, model.device, model.lm_head
        end = model.generation_config.eos_token_id
        self.ends = {end} if isinstance(end, int) else set(end or ())
        self.norm, self.fuse = Norm(fuse), fuse
        self.shards = [self.Heads(model, max_length, self.norm, one, num_shards) for one in shards]
        self.has_all = len(shards) == num_shards

    def allocate(self, num_blocks, block_size):
        """The caches, one for each shard."""
        return [
            cc.PagedKVCache.allocate(
                num_blocks=num_blocks, block_size=block_size, dtype=self.model.dtype,
                device=self.device, **shard.sizes,
            )
            for shard in self.shards
        ]  # fmt: skip

    def attend(self, caches, index, hidden, step, starts):
        """What comes of all heads of a layer."""
        parts = [
            shard.attend(cache, index, hidden, step, starts)
            for shard, cache in zip(self.shards, caches)
        ]
        made = functools.reduce(torch.add, parts)
        if not self.has_all:
            dist.all_reduce(made)
        return made


class LlamaHeads:
    """Grouped heads, rotary positions."""

    def __init__(self, model, max_length, norm, shard, num_shards):
        del norm
        config, attention = model.config, [layer.self_attn for layer in model.model.layers]
        self.query_heads = config.num_attention_heads // num_shards
        self.kv_heads, self.head_size = config.num_key_value_heads // num_shards, config.head_dim
        self.angles = cos_sin_cache(model.model.rotary_emb, model.device, max_length)
        self.into = [join((one.q_proj, one.k_proj, one.v_proj), shard, num_shards)
                     for one in attention]  # fmt: skip
        self.back = [one.o_proj.weight.chunk(num_shards, 1)[shard] for one in attention]
        self.sizes = {
            "num_layers": len(attention), "num_kv_heads": self.kv_heads,
            "head_size": self.head_size,
        }  # fmt: skip

    def attend(self, cache, index, hidden, step, starts):
        projected = F.linear(hidden, self.into[index]).unflatten(-1, (-1, self.head_size))
        heads = self.query_heads, self.kv_heads, self.kv_heads
        query, key, value = projected.split(heads, 1)
        cache.rotary_write(index, step.positions, query, key, value, self.angles, step.slot_mapping)
        attended = cache.attend(
            index, query, step.block_table, step.seq_lens, query_start_loc=starts
        )
        return F.linear(attended.flatten(1), self.back[index])


class Llama(Model):
    """`LlamaForCausalLM`."""

    Heads = LlamaHeads

    def __init__(self, model, *given, **options):
        super().__init__(model, *given, **options)
        self.swiglu = self.fuse(swiglu)
        mlps = [layer.mlp for layer in model.model.layers]
        self.gate_and_up = [join((mlp.gate_proj, mlp.up_proj)) for mlp in mlps]

    def forward(self, caches, step, starts):
        model = self.model.model
        hidden = model.embed_tokens(step.token_ids)
        for index, layer in enumerate(model.layers):
            normed = self.norm(layer.input_layernorm, hidden)
            attended = self.attend(caches, index, normed, step, starts)
            hidden, normed = self.norm.of_sum(layer.post_attention_layernorm, hidden, attended)
            gated = self.swiglu(F.linear(normed, self.gate_and_up[index]))
            hidden.addmm_(gated, layer.mlp.down_proj.weight.t())
        return self.norm(model.norm, hidden)


class BloomHeads:
    """ALiBi in place of positions."""

    def __init__(self, model, max_length, norm, shard, num_shards):
        del max_length, norm  # positions have no table, and its norms are one kernel
        config, attention = model.config, [block.self_attention for block in model.transformer.h]
        self.heads = config.n_head // num_shards
        self.slopes = cc.alibi_slopes(
            config.n_head, tp_rank=shard, tp_size=num_shards, framework="torch", device=model.device
        )
        into = [one.query_key_value for one in attention]
        self.into = [
            (one.weight.chunk(num_shards)[shard], one.bias.chunk(num_shards)[shard]) for one in into
        ]
        self.back = [
            (one.dense.weight.chunk(num_shards, 1)[shard], None if shard else one.dense.bias)
            for one in attention
        ]
        self.sizes = {
            "num_layers": config.n_layer, "num_kv_heads": self.heads,
            "head_size": config.hidden_size // config.n_head,
        }  # fmt: skip

    def attend(self, cache, index, hidden, step, starts):
        projected = F.linear(hidden, *self.into[index])
        query, key, value = projected.unflatten(-1, (self.heads, 3, -1)).unbind(2)
        cache.write(index, key, value, step.slot_mapping)
        attended = cache.attend(
            index, query, step.block_table, step.seq_lens, query_start_loc=starts,
            alibi_slopes=self.slopes,
        )  # fmt: skip
        return F.linear(attended.flatten(1), *self.back[index])


class Bloom(Model):
    """`BloomForCausalLM`."""

    Heads = BloomHeads

    def forward(self, caches, step, starts):
        model = self.model.transformer
        hidden = model.word_embeddings_layernorm(model.word_embeddings(step.token_ids))
        for index, block in enumerate(model.h):
            normed = block.input_layernorm(hidden)
            hidden = hidden + self.attend(caches, index, normed, step, starts)
            hidden = block.mlp(block.post_attention_layernorm(hidden), hidden)
        return model.ln_f(hidden)


class DeepseekV3Heads:
    """Latent attention, whose up-projections are absorbed into queries and results. Each shard has
    all entries."""

    def __init__(self, model, max_length, norm, shard, num_shards):
        self.config, self.norm, config = model.config, norm, model.config
        self.modules = [layer.self_attn for layer in model.model.layers]
        self.heads = config.num_attention_heads // num_shards
        self.angles = cos_sin_cache(model.model.rotary_emb, model.device, max_length)
        query = [one.q_proj if config.q_lora_rank is None else one.q_b_proj for one in self.modules]
        self.query = [one.weight.chunk(num_shards)[shard] for one in query]
        sizes = config.qk_nope_head_dim, config.v_head_dim
        up = [one.kv_b_proj.weight.data.chunk(num_shards)[shard] for one in self.modules]
        up = [weight.unflatten(0, (self.heads, -1)) for weight in up]
        self.up = [weight.split(sizes, 1) for weight in up]  # [heads, size, latent]
        self.back = [one.o_proj.weight.chunk(num_shards, 1)[shard] for one in self.modules]
        self.sizes = {
            "num_layers": len(self.modules), "num_kv_heads": 1, "layout": "rows",
            "head_size": config.kv_lora_rank + config.qk_rope_head_dim,
        }  # fmt: skip

    def attend(self, cache, index, hidden, step, starts):
        config, module, (key_up, value_up) = self.config, self.modules[index], self.up[index]
        latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
        query = hidden
        if config.q_lora_rank is not None:
            query = self.norm(module.q_a_layernorm, module.q_a_proj(hidden))
        query = F.linear(query, self.query[index]).unflatten(-1, (self.heads, -1))
        plain, turned = query.split((config.qk_nope_head_dim, rope), -1)
        query = torch.cat([torch.einsum("thn,hnl->thl", plain, key_up), turned], -1)
        entry, key_rope = module.kv_a_proj_with_mqa(hidden).split((latent, rope), -1)
        entry = self.norm(module.kv_a_layernorm, entry)
        cache.rotary_write(
            index, step.positions, query[..., latent:], key_rope, entry, self.angles,
            step.slot_mapping, not config.rope_interleave,
        )  # fmt: skip
        attended = cache.attend_mla(
            index, query, step.block_table, step.seq_lens, query_start_loc=starts,
            scale=module.scaling, kv_lora_rank=latent,
        )  # fmt: skip
        attended = torch.einsum("thl,hvl->thv", attended, value_up)
        return F.linear(attended.flatten(1), self.back[index])


class DeepseekV3(Model):
    """`DeepseekV3ForCausalLM`: latent attention and experts."""

    Heads = DeepseekV3Heads

    def forward(self, caches, step, starts):
        model = self.model.model
        hidden = model.embed_tokens(step.token_ids)
        for index, layer in enumerate(model.layers):
            normed = self.norm(layer.input_layernorm, hidden)
            hidden = hidden + self.attend(caches, index, normed, step, starts)
            normed = self.norm(layer.post_attention_layernorm, hidden)
            hidden = hidden + layer.mlp(normed[None])[0]
        return self.norm(model.norm, hidden)


def paged(model, max_length, **options):
    """The `Model` of a model of transformers."""
    kinds = {"llama": Llama, "bloom": Bloom, "deepseek_v3": DeepseekV3}
    return kinds[model.config.model_type](model, max_length, **options)


# --- parts of models


class Norm:
    """RMS norms with the weights of transformers' modules."""

    def __init__(self, fuse):
        self.norm, self.add_and_norm = fuse(rms_norm), fuse(add_and_norm)

    def __call__(self, module, hidden):
        return self.norm(hidden, module.weight, module.variance_epsilon)

    def of_sum(self, module, hidden, more):
        """The sum, and its norm."""
        return self.add_and_norm(hidden, more, module.weight, module.variance_epsilon)


def rms_norm(hidden, weight, epsilon):
    return F.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)


def add_and_norm(hidden, more, weight, epsilon):
    hidden = hidden + more
    return hidden, rms_norm(hidden, weight, epsilon)


def swiglu(gate_and_up):
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up


def join(linears, shard=0, num_shards=1):
    """A shard of linear modules of the same input, as one matrix. Where that is all of them, the
    modules' weights become views of it: they need no memory of their own."""
    weights = [linear.weight.data.chunk(num_shards)[shard] for linear in linears]
    joined = torch.cat(weights)
    if num_shards == 1:
        for linear, view in zip(linears, joined.split([len(weight) for weight in weights])):
            linear.weight.data = view
    return joined


def cos_sin_cache(rotary, device, length):
    """The table of a rotary embedding: [length, cosines and then sines]."""
    positions = torch.arange(length, device=device)[None]
    tables = rotary(torch.empty(0, device=device), positions)  # each angle twice
    return torch.cat([table[0].chunk(2, -1)[0] for table in tables], -1).contiguous()


# --- what the engine is compared with


def small_models():
    """Models with random weights, by name: configurations like those of large ones."""
    alike = {
        "vocab_size": 512, "hidden_size": 128, "bos_token_id": None, "eos_token_id": 2,
        "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    return {
        "llama": transformers.LlamaConfig(
            **alike, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
            head_dim=32, intermediate_size=256,
        ),
        "bloom": transformers.BloomConfig(**alike, n_layer=3, n_head=4),
        "deepseek_v3": transformers.DeepseekV3Config(
            **alike, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            kv_lora_rank=64, q_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16,
            v_head_dim=32, intermediate_size=256, moe_intermediate_size=64, n_routed_experts=8,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        ),
    }  # fmt: skip


def generated(model, prompt, max_new_tokens, num_beams=1):
    """The tokens of ``generate``."""
    given = torch.tensor([prompt], device=model.device)
    # Without a mask, generate takes one of the tokens for padding.
    options = {"attention_mask": torch.ones_like(given), "do_sample": False}
    made = model.generate(given, **options, max_new_tokens=max_new_tokens, num_beams=num_beams)
    return made[0].tolist()
