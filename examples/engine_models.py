# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What `engine.py` runs: stock models of Hugging Face's transformers, with rotary embeddings,
attention and all that keys and values need done over the pages of a `PagedKVCache`.

Weights and most modules are the model's own; where transformers' modules are many small kernels, in
norms and gates, there are functions of torch instead. Each class makes the caches that its model
needs, and turns the arrays of a step into the hidden states of its tokens, [num_tokens, hidden].
``fuse`` makes one kernel of a function of several, as ``torch.compile`` does. ``ranks`` is (number
of this process, of how many): each has a part of every layer's heads, and torch.distributed adds up
what comes of them. What other processes have is then cut off the model's own weights.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

import cupy_cache as cc


def rms_norm(hidden, weight, epsilon):
    return F.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)


def swiglu(gate_and_up):
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up


class Norm:
    """RMS norms with the weights of transformers' modules."""

    def __init__(self, fuse):
        self.function = fuse(rms_norm)

    def __call__(self, module, hidden):
        return self.function(hidden, module.weight, module.variance_epsilon)


def join(*linears):
    """Linear modules of the same input as one matrix; the modules' weights become views of it."""
    weights = [linear.weight for linear in linears]
    joined = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, joined.split([len(weight) for weight in weights])):
        weight.data = part
    return joined


def keep_heads(ranks, into, out):
    """Leave of linear modules what this process's heads need: of those ``into`` heads a part of the
    rows, of those ``out`` of heads a part of the columns."""
    rank, size = ranks
    for linears, dim in ((into, 0), (out, 1)):
        for linear in linears if size > 1 else ():
            linear.weight.data = linear.weight.data.chunk(size, dim)[rank].contiguous()
            if linear.bias is not None and dim == 0:
                linear.bias.data = linear.bias.data.chunk(size)[rank].contiguous()
            elif linear.bias is not None and rank:  # it is added once
                linear.bias.data = torch.zeros_like(linear.bias.data)


def of_all_heads(ranks, part):
    """The sum of what the processes made of their heads."""
    if ranks[1] > 1:
        dist.all_reduce(part)
    return part


def cos_sin_cache(rotary, device, length):
    """The table of a rotary embedding: [length, cosines and then sines]."""
    positions = torch.arange(length, device=device)[None]
    tables = rotary(torch.empty(0, device=device), positions)  # each angle twice
    return torch.cat([table[0].chunk(2, -1)[0] for table in tables], -1).contiguous()


class Llama:
    """`LlamaForCausalLM`: grouped heads, rotary positions."""

    def __init__(self, model, length, fuse, ranks):
        self.model, self.norm, self.swiglu = model, Norm(fuse), fuse(swiglu)
        self.angles = cos_sin_cache(model.model.rotary_emb, model.device, length)
        layers = model.model.layers
        attention = [layer.self_attn for layer in layers]
        self.ranks, self.kv_heads = ranks, model.config.num_key_value_heads // ranks[1]
        self.query_heads = model.config.num_attention_heads // ranks[1]
        for one in attention:
            keep_heads(ranks, (one.q_proj, one.k_proj, one.v_proj), (one.o_proj,))
        self.query_key_value = [join(one.q_proj, one.k_proj, one.v_proj) for one in attention]
        self.gate_and_up = [join(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in layers]

    def allocate(self, num_blocks, block_size, **where):
        config = self.model.config
        return cc.PagedKVCache.allocate(
            config.num_hidden_layers, num_blocks, block_size, self.kv_heads, config.head_dim,
            dtype=self.model.dtype, **where,
        )  # fmt: skip

    def forward(self, cache, step, starts):
        config, model = self.model.config, self.model.model
        heads = self.query_heads, self.kv_heads, self.kv_heads
        hidden = model.embed_tokens(step.token_ids)
        for index, layer in enumerate(model.layers):
            normed = self.norm(layer.input_layernorm, hidden)
            projected = F.linear(normed, self.query_key_value[index])
            query, key, value = projected.unflatten(-1, (-1, config.head_dim)).split(heads, 1)
            cache.rotary_write(
                index, step.positions, query, key, value, self.angles, step.slot_mapping
            )
            attended = cache.attend(
                index, query, step.block_table, step.seq_lens, query_start_loc=starts
            )
            back = layer.self_attn.o_proj.weight.t()
            if self.ranks[1] == 1:
                hidden.addmm_(attended.flatten(1), back)  # and added
            else:
                hidden += of_all_heads(self.ranks, attended.flatten(1) @ back)
            normed = self.norm(layer.post_attention_layernorm, hidden)
            gated = self.swiglu(F.linear(normed, self.gate_and_up[index]))
            hidden.addmm_(gated, layer.mlp.down_proj.weight.t())
        return self.norm(model.norm, hidden)


class Bloom:
    """`BloomForCausalLM`: ALiBi in place of positions."""

    def __init__(self, model, length, fuse, ranks):
        del length, fuse  # positions have no table, and its norms are one kernel
        self.model, self.ranks, (rank, size) = model, ranks, ranks
        self.heads = model.config.n_head // size
        self.slopes = cc.alibi_slopes(
            model.config.n_head, tp_rank=rank, tp_size=size, framework="torch", device=model.device
        )
        for block in model.transformer.h:
            attention = block.self_attention
            keep_heads(ranks, (attention.query_key_value,), (attention.dense,))

    def allocate(self, num_blocks, block_size, **where):
        config = self.model.config
        return cc.PagedKVCache.allocate(
            config.n_layer, num_blocks, block_size, self.heads, config.hidden_size // config.n_head,
            dtype=self.model.dtype, **where,
        )  # fmt: skip

    def forward(self, cache, step, starts):
        model = self.model.transformer
        hidden = model.word_embeddings_layernorm(model.word_embeddings(step.token_ids))
        for index, block in enumerate(model.h):
            projected = block.self_attention.query_key_value(block.input_layernorm(hidden))
            query, key, value = projected.unflatten(-1, (self.heads, 3, -1)).unbind(2)
            cache.write(index, key, value, step.slot_mapping)
            attended = cache.attend(
                index, query, step.block_table, step.seq_lens, query_start_loc=starts,
                alibi_slopes=self.slopes,
            )  # fmt: skip
            part = block.self_attention.dense(attended.flatten(1))
            hidden = hidden + of_all_heads(self.ranks, part)
            hidden = block.mlp(block.post_attention_layernorm(hidden), hidden)
        return model.ln_f(hidden)


class DeepseekV3:
    """`DeepseekV3ForCausalLM`: latent attention, whose up-projections are absorbed into queries and
    results, and experts."""

    def __init__(self, model, length, fuse, ranks):
        self.model, self.norm, self.ranks, config = model, Norm(fuse), ranks, model.config
        self.angles = cos_sin_cache(model.model.rotary_emb, model.device, length)
        self.heads = config.num_attention_heads // ranks[1]
        for layer in model.model.layers:
            one = layer.self_attn
            query = one.q_proj if config.q_lora_rank is None else one.q_b_proj
            keep_heads(ranks, (query, one.kv_b_proj), (one.o_proj,))
        sizes = config.qk_nope_head_dim, config.v_head_dim
        up = [layer.self_attn.kv_b_proj.weight.data for layer in model.model.layers]
        up = [weight.unflatten(0, (self.heads, -1)) for weight in up]
        self.up = [weight.split(sizes, 1) for weight in up]  # [heads, size, latent]

    def allocate(self, num_blocks, block_size, **where):
        config = self.model.config
        return cc.PagedKVCache.allocate(
            config.num_hidden_layers, num_blocks, block_size, 1,
            config.kv_lora_rank + config.qk_rope_head_dim, layout="rows", dtype=self.model.dtype,
            **where,
        )  # fmt: skip

    def forward(self, cache, step, starts):
        config, model = self.model.config, self.model.model
        latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
        hidden = model.embed_tokens(step.token_ids)
        for index, layer in enumerate(model.layers):
            attention, normed = layer.self_attn, self.norm(layer.input_layernorm, hidden)
            key_up, value_up = self.up[index]
            if config.q_lora_rank is None:
                query = attention.q_proj(normed)
            else:
                query = self.norm(attention.q_a_layernorm, attention.q_a_proj(normed))
                query = attention.q_b_proj(query)
            query = query.unflatten(-1, (self.heads, -1))
            plain, turned = query.split((config.qk_nope_head_dim, rope), -1)
            query = torch.cat([torch.einsum("thn,hnl->thl", plain, key_up), turned], -1)
            entry, key_rope = attention.kv_a_proj_with_mqa(normed).split((latent, rope), -1)
            entry = self.norm(attention.kv_a_layernorm, entry)
            cache.rotary_write(
                index, step.positions, query[..., latent:], key_rope, entry, self.angles,
                step.slot_mapping, not config.rope_interleave,
            )  # fmt: skip
            attended = cache.attend_mla(
                index, query, step.block_table, step.seq_lens, query_start_loc=starts,
                scale=attention.scaling, kv_lora_rank=latent,
            )  # fmt: skip
            attended = torch.einsum("thl,hvl->thv", attended, value_up)
            hidden = hidden + of_all_heads(self.ranks, attention.o_proj(attended.flatten(1)))
            normed = self.norm(layer.post_attention_layernorm, hidden)
            hidden = hidden + layer.mlp(normed[None])[0]
        return self.norm(model.norm, hidden)


MODELS = {"llama": Llama, "bloom": Bloom, "deepseek_v3": DeepseekV3}


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
