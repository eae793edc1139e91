"""The model as a whole: names, loss, options, checkpointing, caching."""

import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmtrain.errors import UserError
from llmtrain.model.block import Block
from llmtrain.model.cache import KVCache
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT, LMHead

VOCAB = 97


def build(attn: dict[str, Any] | None = None, **options: Any) -> MPT:
    torch.manual_seed(0)
    sizes = {"d_model": 40, "n_heads": 5, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 64}
    return MPT(MPTConfig(**{**sizes, "attn_config": {"alibi": True, **(attn or {})}, **options}))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: MPT, ids: Tensor, **rest: Any) -> Tensor:
    out = model(ids, **rest).logits
    assert out is not None
    return out


def test_names_are_the_checkpoint_contract() -> None:
    block = ["norm_1.weight", "attn.Wqkv.weight", "attn.out_proj.weight", "norm_2.weight"]
    block += ["ffn.up_proj.weight", "ffn.down_proj.weight"]
    blocks = [f"transformer.blocks.{i}.{name}" for i in range(2) for name in block]
    assert list(build(no_bias=True).state_dict()) == ["transformer.wte.weight", *blocks, "transformer.norm_f.weight"]
    learned = build({"alibi": False}, tie_word_embeddings=False)
    names = set(learned.state_dict())
    assert {"transformer.wpe.weight", "lm_head.weight", "transformer.norm_f.bias"} <= names
    assert "lm_head.bias" not in names
    assert not list(learned.buffers())
    with_qk_ln = set(build({"qk_ln": True}, no_bias=True).state_dict())
    assert {"transformer.blocks.1.attn.q_ln.weight", "transformer.blocks.1.attn.k_ln.weight"} <= with_qk_ln


@pytest.mark.parametrize("attention_bias", [True, False])
@pytest.mark.parametrize("no_bias", [True, False])
def test_attention_bias_wins_for_wqkv(no_bias: bool, attention_bias: bool) -> None:
    names = [n for n in build(no_bias=no_bias, attention_bias=attention_bias).state_dict() if n.endswith("bias")]
    assert any("Wqkv" in n for n in names) == attention_bias
    assert any("norm_f" in n for n in names) != no_bias


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("logit_scale", [None, 0.5, "inv_sqrt_d_model"])
def test_loss_is_that_of_the_logits(tied: bool, logit_scale: Any) -> None:
    model = build(tie_word_embeddings=tied, logit_scale=logit_scale).double()
    ids = tokens(3, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[2] = -100
    expected = F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    out = model(ids, labels=labels, token_losses=True)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    assert out.logits is None
    assert out.n_correct is None
    each = F.cross_entropy(logits(model, ids)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(out.token_losses, F.pad(each.detach(), (0, 1)))
    assert out.n_targets == (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(out.loss_sum, expected * out.n_targets)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=lambda m, n=name: f"{n}: {m}")


def test_logit_scale_scales() -> None:
    ids = tokens(1, 4)
    plain = logits(build(), ids)
    torch.testing.assert_close(logits(build(logit_scale=3.0), ids), 3 * plain)
    torch.testing.assert_close(logits(build(logit_scale="inv_sqrt_d_model"), ids), plain / 40**0.5)


def test_correct_predictions_are_counted_in_evaluation() -> None:
    model = build().eval()
    ids = tokens(4, 30)
    with torch.no_grad():
        out = model(ids, labels=ids)
        expected = (logits(model, ids)[:, :-1].argmax(-1) == ids[:, 1:]).sum()
    assert out.n_correct == expected
    assert out.n_targets == 4 * 29


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    model, ids = build(), tokens(2, 8)
    out = model(ids, labels=torch.full_like(ids, -100))
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_embedding_fraction_scales_the_gradient_only(fraction: float) -> None:
    ids = tokens(2, 8)
    plain, shrunk = (build(tie_word_embeddings=False, embedding_fraction=f).double() for f in (1.0, fraction))
    torch.testing.assert_close(logits(plain, ids), logits(shrunk, ids))
    for model in (plain, shrunk):
        model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(shrunk.transformer.wte.weight.grad, fraction * plain.transformer.wte.weight.grad)
    torch.testing.assert_close(shrunk.lm_head.weight.grad, plain.lm_head.weight.grad)


@pytest.mark.parametrize("where", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropouts_act_in_training_only(where: str) -> None:
    p = {where: 0.5}
    model = build(p) if where == "attn_pdrop" else build(**p)
    ids = tokens(2, 16)
    assert not torch.equal(logits(model, ids), logits(model, ids))
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))
    torch.testing.assert_close(logits(model, ids), logits(build().eval(), ids))


def test_clip_qkv_comes_before_qk_ln() -> None:
    seen: list[Tensor] = []
    model = build({"qk_ln": True, "clip_qkv": 0.01})
    attn = model.transformer.blocks[0].attn
    attn.q_ln.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, tokens(2, 8))
    assert seen[0].shape == (2, 8, 40)
    assert seen[0].abs().max().item() == pytest.approx(0.01)


@pytest.mark.parametrize("alibi", [True, False])
def test_causality(alibi: bool) -> None:
    model, ids = build({"alibi": alibi}), tokens(1, 20)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % VOCAB
    difference = (logits(model, ids) - logits(model, changed)).abs().amax(-1)[0]
    assert not difference[:12].any()
    assert (difference[12:] > 0).all()


@pytest.mark.parametrize("alibi", [True, False])
def test_padding_changes_nothing(alibi: bool) -> None:
    model, ids = build({"alibi": alibi}).double(), tokens(1, 20)
    alone = logits(model, ids)
    for left in (True, False):
        padded = F.pad(ids, (7, 0) if left else (0, 7), value=3).repeat(2, 1)
        mask = torch.zeros_like(padded)
        real = slice(7, 27) if left else slice(0, 20)
        mask[:, real] = 1
        both = logits(model, padded, attention_mask=mask)
        torch.testing.assert_close(both[:1, real], alone)
        both.sum().backward()
        assert both.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_cached_forwards_equal_the_whole(alibi: bool, padded: bool) -> None:
    model, ids = build({"alibi": alibi}).double().eval(), tokens(3, 40)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = mask[2, :3] = 0
    given = mask if padded else None
    with torch.no_grad():
        whole = logits(model, ids, attention_mask=given)
        for cuts in ([*range(1, 40)], [10, 11, 25]):  # token by token, and in chunks
            cache, parts, start = KVCache(2, capacity=4), [], 0
            for end in [*cuts, 40]:
                if padded and end < 10:  # a prompt holds at least one real token of every row
                    continue
                parts.append(
                    logits(model, ids[:, start:end], attention_mask=mask[:, :end] if padded else None, cache=cache)
                )
                start = end
            assert cache.length == 40
            torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])


def test_cache_keeps_rows() -> None:
    model, ids = build().double().eval(), tokens(3, 12)
    with torch.no_grad():
        cache = KVCache(2)
        logits(model, ids[:, :8], cache=cache)
        cache.keep_rows(torch.tensor([2, 0]))
        rest = logits(model, ids[[2, 0], 8:], cache=cache)
    torch.testing.assert_close(rest, logits(model, ids)[[2, 0], 8:])


def test_a_prompt_padded_on_the_right_cannot_be_continued() -> None:
    mask = torch.tensor([[1, 1, 0]])
    with pytest.raises(ValueError, match="left"):
        build()(tokens(1, 3), attention_mask=mask, cache=KVCache(2))


def test_a_mask_covers_what_is_cached() -> None:
    model, cache = build().eval(), KVCache(2)
    with torch.no_grad():
        logits(model, tokens(1, 3), attention_mask=torch.ones(1, 3), cache=cache)
        with pytest.raises(ValueError, match=r"\(1, 4\)"):
            model(tokens(1, 1), attention_mask=torch.ones(1, 1), cache=cache)


def test_learned_positions_have_an_end() -> None:
    model = build({"alibi": False})
    with pytest.raises(UserError, match="max_seq_len: 64"):
        model(tokens(1, 65))
    assert logits(build(), tokens(1, 65)).shape == (1, 65, VOCAB)  # ALiBi has none


@pytest.mark.parametrize("sequence_id", [None, torch.arange(18).reshape(2, 9) // 4])
def test_sequence_id_is_accepted_and_not_used_unless_asked_for(sequence_id: Tensor | None) -> None:
    model, ids = build(), tokens(2, 9)
    torch.testing.assert_close(logits(model, ids, sequence_id=sequence_id), logits(model, ids))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model, ids = build(resid_pdrop=0.2).double(), tokens(2, 16)
    torch.manual_seed(3)
    model(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    recomputed = 0

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any) -> Any:
            return checkpoint(self._run, *args, use_reentrant=False)

        def _run(self, *args: Any) -> Any:
            nonlocal recomputed
            recomputed += 1
            return self.block(*args)

    wrapped = [Checkpointed(m) for m in model.modules() if model.activation_checkpointing_fn(m)]
    model.transformer.blocks = nn.ModuleList(wrapped)
    torch.manual_seed(3)
    model(ids, labels=ids).loss.backward()
    assert recomputed == 2 * 2
    actual = {n.replace(".block.", "."): p.grad for n, p in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad)


def test_bfloat16_autocast_is_close_and_keeps_gradients_in_float32() -> None:
    model, ids = build({"qk_ln": True}), tokens(2, 60)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
        assert logits(model, ids).dtype == torch.bfloat16
    out.loss.backward()
    assert (out.loss - exact).abs() < 0.01 * exact
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_wrapping_rules() -> None:
    model = build(tie_word_embeddings=False)
    assert [type(m) for m in model.modules() if model.fsdp_wrap_fn(m)] == [Block, Block, LMHead]
    assert [type(m) for m in model.modules() if model.activation_checkpointing_fn(m)] == [Block, Block]


def test_the_choice_of_kernel_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build({"attn_impl": "triton"})
    with caplog.at_level(logging.INFO, logger="llmtrain"):
        logits(model, tokens(1, 3))
        logits(model, tokens(1, 3))
    assert [r.getMessage() for r in caplog.records] == [model.transformer.choice.reason]
    assert "triton" in caplog.text


def test_pickles() -> None:
    model = build()
    ids = tokens(1, 5)
    expected = logits(model, ids)  # after a forward, with the kernel chosen
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(model)), ids), expected)
