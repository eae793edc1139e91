import json
import shutil
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import compare, manifest
from llmtrain.checkpoint import export as export_module
from llmtrain.checkpoint.export import export
from llmtrain.checkpoint.hugging_face import read_hf_folder, write_hf_folder
from llmtrain.checkpoint.hugging_face_config import from_hugging_face, to_hugging_face
from llmtrain.checkpoint.layouts.mpt import MptLayout
from llmtrain.checkpoint.read import read_weights
from llmtrain.checkpoint.weights import InMemory
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.tokenizer import TokenizerConfig, fingerprint_of, load_tokenizer


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def nothing_left(folder: Path) -> bool:
    return not any("export" in p.name or p.name.startswith("out") for p in folder.iterdir())


@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"tie_word_embeddings": False},
        {"d_model": 60, "n_heads": 5},
        {"attn_config": {"alibi": True, "clip_qkv": 1, "softmax_scale": 0.3, "attn_pdrop": 0.1}, "norm_eps": 1e-4},
        {"norm_type": "layernorm", "resid_pdrop": 0.1, "embedding_fraction": 0.1, "max_seq_len": 20},
        {"attn_config": {"alibi": True, "attn_uses_sequence_id": True}},
    ],
    ids=["plain", "untied", "five-heads", "clip-scale-eps", "short", "packed"],
)
def test_transformers_opens_the_same_function(run, tmp_path: Path, kind: str, model: dict) -> None:
    _, weights = run.save(kind=kind, **model)
    report = export(run.folder, tmp_path / "out")
    assert report.max_difference <= report.tolerance
    assert report.tokens >= 3 * min(16, 10)
    assert report.parameters == sum(v.numel() for v in weights.values())
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not any(name.endswith((".bin", ".py")) for name in names)
    config, found = read_hf_folder(tmp_path / "out")
    assert same(found, weights)
    source = read_weights(run.folder)[0]
    for key in ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "norm_eps", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(source, key)
    assert config.attn_config.clip_qkv == source.attn_config.clip_qkv
    assert config.attn_config.softmax_scale == source.attn_config.softmax_scale


def test_the_same_export_again_is_left_as_it_is(run, tmp_path: Path) -> None:
    run.save(step=10)
    first = export(run.folder, tmp_path / "out")
    written = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    again = export(run.folder, tmp_path / "out")
    assert (first.done_before, again.done_before) == (False, True)
    assert again.max_difference == first.max_difference
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="--overwrite"):
        export(run.folder, tmp_path / "out", dtype="bfloat16")
    run.save(step=20)
    with pytest.raises(UserError, match="--overwrite"):
        export(run.folder, tmp_path / "out")


def test_opened_without_our_code(run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run.save()
    export(run.folder, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__module__ == "transformers.models.mpt.modeling_mpt"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id is not None
    ids = tokenizer("the quick brown", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_a_cast_is_the_rounding_and_nothing_else(run, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    _, weights = run.save()
    report = export(run.folder, tmp_path / "out", dtype=name)
    assert report.max_difference <= report.tolerance
    assert same(read_hf_folder(tmp_path / "out")[1], {n: v.to(dtype) for n, v in weights.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix(
        "torch."
    )


def test_large_models_get_shards_and_an_index(run, tmp_path: Path) -> None:
    _, weights = run.save()
    export(run.folder, tmp_path / "out", max_shard_size=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert same(read_hf_folder(tmp_path / "out")[1], weights)


REFUSED = {
    "attn_config.alibi: false (learned positions": {"attn_config": {"alibi": False}},
    "attn_config.alibi: false (no positions": {"attn_config": {"alibi": False}, "learned_pos_emb": False},
    "attn_config.alibi_bias_max: 16": {"attn_config": {"alibi": True, "alibi_bias_max": 16}},
    "attn_config.qk_ln: true": {"attn_config": {"alibi": True, "qk_ln": True}},
    "expansion_ratio: 2": {"expansion_ratio": 2},
    "expansion_ratio: 1": {"ffn_config": {"ffn_hidden_size": 32}},
    "ffn_config.ffn_act_fn: relu": {"ffn_config": {"ffn_act_fn": {"name": "relu"}}},
    "ffn_config.ffn_act_fn: gelu": {"ffn_config": {"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}},
    "logit_scale: inv_sqrt_d_model": {"logit_scale": "inv_sqrt_d_model"},
    "logit_scale: 2.0": {"logit_scale": 2.0},
    "no_bias: false": {"no_bias": False},
    "attention_bias: true": {"attention_bias": True},
    "norm_type: rmsnorm": {"norm_type": "rmsnorm"},
    "norm_type: low_precision_rmsnorm": {"norm_type": "low_precision_rmsnorm"},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_transformers_ignores_is_refused_by_key(run, tmp_path: Path, key: str) -> None:
    run.save(**REFUSED[key])
    with pytest.raises(UserError) as error:
        export(run.folder, tmp_path / "out")
    assert key in str(error.value)
    assert nothing_left(tmp_path)


def test_all_offending_keys_at_once(run, tmp_path: Path) -> None:
    run.save(no_bias=False, expansion_ratio=2, attn_config={"alibi": True, "alibi_bias_max": 16, "qk_ln": True})
    with pytest.raises(UserError) as error:
        export(run.folder, tmp_path / "out")
    for key in ("no_bias", "expansion_ratio", "alibi_bias_max", "qk_ln"):
        assert f"{key}: " in str(error.value)


class TestTheProofCanFail:
    """Each kind of difference, made on purpose between writing and comparing."""

    def sabotage(self, monkeypatch: pytest.MonkeyPatch, change) -> None:
        real = write_hf_folder

        def broken(folder: Path, *args, **kwargs) -> None:
            real(folder, *args, **kwargs)
            change(folder)

        monkeypatch.setattr(export_module, "write_hf_folder", broken)

    def edit_weights(self, folder: Path, edit) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def edit_config(self, folder: Path, **changes) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["attn_config"].update(changes.pop("attn_config", {}))
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    def refused(self, run, tmp_path: Path, match: str) -> None:
        run.save()
        with pytest.raises(UserError, match=match):
            export(run.folder, tmp_path / "out")
        assert nothing_left(tmp_path)

    def test_one_value_off_by_a_rounding(self, run, tmp_path: Path, monkeypatch) -> None:
        def nudge(weights) -> None:
            value = weights["transformer.norm_f.weight"]
            value[3] = torch.nextafter(value[3], torch.tensor(9.0))

        self.sabotage(monkeypatch, lambda folder: self.edit_weights(folder, nudge))
        self.refused(run, tmp_path, r"tensors differ: \['transformer.norm_f.weight'\]")

    def test_a_missing_key(self, run, tmp_path: Path, monkeypatch) -> None:
        name = "transformer.blocks.1.norm_2.weight"
        self.sabotage(monkeypatch, lambda folder: self.edit_weights(folder, lambda w: w.pop(name)))
        self.refused(run, tmp_path, rf"missing keys: \['{name}'\]")

    def test_an_unexpected_key(self, run, tmp_path: Path, monkeypatch) -> None:
        def add(weights) -> None:
            weights["transformer.wpe.weight"] = torch.zeros(4, 4)

        self.sabotage(monkeypatch, lambda folder: self.edit_weights(folder, add))
        self.refused(run, tmp_path, r"unexpected keys: \['transformer.wpe.weight'\]")

    @pytest.mark.parametrize(
        "changes",
        [{"attn_config": {"softmax_scale": 0.4}}, {"layer_norm_epsilon": 1e-2}, {"attn_config": {"clip_qkv": 0.5}}],
    )
    def test_another_function_with_the_same_weights(self, run, tmp_path: Path, monkeypatch, changes) -> None:
        self.sabotage(monkeypatch, lambda folder: self.edit_config(folder, **changes))
        self.refused(run, tmp_path, "logits differ by")

    def test_greedy_tokens(self, run, tmp_path: Path, monkeypatch) -> None:
        def suppress(folder: Path) -> None:
            path = folder / "generation_config.json"
            content = json.loads(path.read_text())
            path.write_text(json.dumps({**content, "repetition_penalty": 50.0}))

        self.sabotage(monkeypatch, suppress)
        self.refused(run, tmp_path, "greedy token")

    @pytest.mark.parametrize("model", [{"attn_config": {"alibi": True, "alibi_bias_max": 12}}, {"logit_scale": 1.01}])
    def test_the_logits_alone_would_catch_an_ignored_key(self, run, tmp_path: Path, monkeypatch, model) -> None:
        path, weights = run.save(**model)
        config, _ = read_weights(path)
        plain = MPTConfig.model_validate(config.model_dump() | {"logit_scale": None} | {"attn_config": {"alibi": True}})
        (tmp_path / "hf").mkdir()
        write_hf_folder(tmp_path / "hf", plain, weights, dtype="float32", tokenizer=None)
        result = compare.compare_with_transformers(tmp_path / "hf", MptLayout(), config, InMemory(weights), None)
        assert "logits differ" in result.problems[0]
        assert result.max_difference > 50 * result.tolerance


def test_broken_weights_are_refused(run, tmp_path: Path) -> None:
    path, weights = run.save(kind="full")
    weights["transformer.norm_f.weight"][0] = float("nan")
    torch.save({"state": {"model": {f"model.{n}": v for n, v in weights.items()}}}, path / "full.pt")
    block = json.loads((path / "manifest.json").read_text())["recipe"]["model"]
    run.seal(path, block, 3, "full")
    with pytest.raises(UserError, match=r"`transformer\.norm_f\.weight` holds NaN"):
        export(run.folder, tmp_path / "out")
    weights["transformer.norm_f.weight"][0] = 1e6
    torch.save({"state": {"model": {f"model.{n}": v for n, v in weights.items()}}}, path / "full.pt")
    run.seal(path, block, 3, "full")
    with pytest.raises(UserError, match="does not fit into float16"):
        export(run.folder, tmp_path / "out", dtype="float16")
    assert nothing_left(tmp_path)


class TestTarget:
    def test_an_export_is_replaced_only_on_request(self, run, tmp_path: Path) -> None:
        run.save(step=1)
        export(run.folder, tmp_path / "out")
        _, newer = run.save(step=2)
        with pytest.raises(UserError, match="--overwrite"):
            export(run.folder, tmp_path / "out")
        export(run.folder, tmp_path / "out", overwrite=True)
        assert same(read_hf_folder(tmp_path / "out")[1], newer)
        assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out"]

    def test_other_files_are_never_replaced(self, run, tmp_path: Path) -> None:
        run.save()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match="holds other files"):
            export(run.folder, tmp_path / "out", overwrite=True)
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="is a file"):
            export(run.folder, tmp_path / "file", overwrite=True)
        assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"

    def test_an_unknown_dtype(self, run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="--dtype int8"):
            export(run.folder, tmp_path / "out", dtype="int8")


class TestTokenizer:
    def test_only_known_files_are_copied(self, run, tmp_path: Path) -> None:
        run.save()
        (run.folder / "tokenizer" / "evil.py").write_text("raise SystemExit")
        export(run.folder, tmp_path / "out")
        assert not (tmp_path / "out" / "evil.py").exists()

    def test_another_tokenizer_is_refused(self, run, tmp_path: Path) -> None:
        run.save()
        path = run.folder / "tokenizer" / "tokenizer.json"
        content = json.loads(path.read_text())
        a, b = list(content["model"]["vocab"])[10:12]
        vocab = content["model"]["vocab"]
        vocab[a], vocab[b] = vocab[b], vocab[a]
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="fingerprint differs"):
            export(run.folder, tmp_path / "out")

    def test_a_chat_template_and_its_end_of_turn_travel(self, run, tmp_path: Path) -> None:
        """With the run's tokenizer, which has two tokens more than the one that the recipe names."""
        from transformers import AutoTokenizer, GenerationConfig

        opened = load_tokenizer(TokenizerConfig(name=str(run.tokenizer), chat_template="chatml", system_prompt="Hi."))
        opened.save_pretrained(run.folder / "tokenizer")
        path, _ = run.save()
        content = json.loads((path / "manifest.json").read_text())
        manifest.write(
            path,
            **{key: content[key] for key in ("kind", "step", "tokens", "recipe")},
            files={name: manifest.FileEntry(**entry) for name, entry in content["files"].items()},
            tokenizer_fingerprint=fingerprint_of(opened),
        )
        export(run.folder, tmp_path / "out")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
        talk = [{"role": "user", "content": "x"}]
        assert theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == (
            "<|im_start|>system\nHi.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
        )
        ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
        assert ends == [opened.eos_token_id, opened.convert_tokens_to_ids("<|im_end|>")]
        assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == opened.eos_token_id

    def test_the_recipes_template_serves_a_lonely_checkpoint(self, run, tmp_path: Path) -> None:
        path, _ = run.save()
        recipe = json.loads((path / "manifest.json").read_text())["recipe"]
        files = {f.name: manifest.file_entry(f) for f in path.iterdir() if f.name != "manifest.json"}
        recipe["tokenizer"]["chat_template"] = "chatml"
        manifest.write(path, kind="sharded", step=3, tokens=1, files=files, recipe=recipe, tokenizer_fingerprint=None)
        shutil.copytree(path, tmp_path / "alone")
        export(tmp_path / "alone", tmp_path / "out")
        assert "<|im_start|>" in (load_tokenizer(TokenizerConfig(name=str(tmp_path / "out"))).chat_template or "")

    def test_a_tokenizer_larger_than_the_model_is_refused(self, run, tmp_path: Path) -> None:
        run.save(vocab_size=128)
        with pytest.raises(UserError, match="do not belong together"):
            export(run.folder, tmp_path / "out")
        assert nothing_left(tmp_path)

    def test_the_recipes_tokenizer_serves_a_lonely_checkpoint(self, run, tmp_path: Path) -> None:
        path, _ = run.save()
        shutil.copytree(path, tmp_path / "alone")
        export(tmp_path / "alone", tmp_path / "out")
        assert (tmp_path / "out" / "tokenizer.json").is_file()

    def test_without_any_tokenizer_the_report_says_so(self, run, tmp_path: Path) -> None:
        _, weights = run.save()
        export(run.folder, tmp_path / "first")
        for file in (tmp_path / "first").glob("*token*"):
            file.unlink()
        report = export(tmp_path / "first", tmp_path / "out")
        assert not report.tokenizer
        assert "WITHOUT a tokenizer" in str(report)
        assert same(read_hf_folder(tmp_path / "out")[1], weights)


class TestReadingHuggingFaceFolders:
    def test_what_transformers_itself_saves(self, tmp_path: Path) -> None:
        from transformers import MptConfig, MptForCausalLM

        torch.manual_seed(0)
        theirs = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=384, max_seq_len=64))
        theirs.save_pretrained(tmp_path)
        config, weights = read_hf_folder(tmp_path)
        ours = MPT(config)
        ours.load_state_dict(weights)
        ids = torch.randint(384, (2, 40))
        assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 2e-5
        theirs.transformer.save_pretrained(tmp_path / "base")
        assert same(read_hf_folder(tmp_path / "base")[1], weights)

    def test_bin_files_are_read_but_not_run(self, run, tmp_path: Path) -> None:
        import os

        _, weights = run.save()
        export(run.folder, tmp_path / "out")
        (tmp_path / "out" / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "out" / "pytorch_model.bin")
        assert same(read_hf_folder(tmp_path / "out")[1], weights)

        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'ran'}",)

        torch.save({**weights, "x": Evil()}, tmp_path / "out" / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"posix\.system"):
            read_hf_folder(tmp_path / "out")
        assert not (tmp_path / "ran").exists()

    def test_mosaics_keys_mean_what_they_say(self) -> None:
        """The config of the released StoryWriter: under transformers' class it would be another function."""
        data = {
            "model_type": "mpt",
            "architectures": ["MPTForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
            "attn_config": {
                "alibi": True,
                "alibi_bias_max": 16,
                "attn_impl": "torch",
                "clip_qkv": 6,
                "prefix_lm": False,
                "attn_uses_sequence_id": True,
            },
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "no_bias": True,
            "vocab_size": 128,
            "max_seq_len": 65536,
            "verbose": 0,
        }
        config = from_hugging_face(data, "config.json")
        assert (config.attn_config.alibi_bias_max, config.attn_config.clip_qkv) == (16, 6)
        assert config.attn_config.attn_uses_sequence_id
        with pytest.raises(UserError, match=r"unclear which function is meant.*alibi_bias_max: 16"):
            from_hugging_face({**data, "architectures": ["MptForCausalLM"]}, "config.json")

    def test_other_models_and_broken_folders(self, run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="only `mpt`"):
            from_hugging_face({"model_type": "gpt2"}, "config.json")
        run.save()
        export(run.folder, tmp_path / "out")
        (tmp_path / "out" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
        with pytest.raises(UserError, match="damaged"):
            read_hf_folder(tmp_path / "out")
        (tmp_path / "out" / "model.safetensors").unlink()
        with pytest.raises(UserError, match="no weights"):
            read_hf_folder(tmp_path / "out")
        index = {"weight_map": {"transformer.wte.weight": "../../x.safetensors"}}
        (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="no name of a file"):
            read_hf_folder(tmp_path / "out")


def test_config_there_and_back() -> None:
    config = MPTConfig.model_validate(
        {"no_bias": True, "attn_config": {"alibi": True, "clip_qkv": 6}, "d_model": 96 * 16}
    )
    back = from_hugging_face(
        json.loads(json.dumps(to_hugging_face(config, "float32", {"eos_token_id": 0}))), "config.json"
    )
    ignored = {"learned_pos_emb", "use_cache"}
    assert back.model_dump(exclude=ignored) == config.model_dump(exclude=ignored)
