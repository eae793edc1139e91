"""llm-foundry's side of prep.py: `json` or `text`, input, output, tokenizer, EOS, row length, processes."""

import sys


def main() -> None:
    kind, source, out, tokenizer, eos, seq_len, processes = sys.argv[1:]
    if kind == "json":
        from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json_from_args

        convert_dataset_json_from_args(
            path=source,
            out_root=out,
            compression=None,
            concat_tokens=int(seq_len),
            split="train",
            tokenizer=tokenizer,
            eos_text=eos,
        )
    else:
        from llmfoundry.command_utils.data_prep.convert_text_to_mds import convert_text_to_mds_from_args

        convert_text_to_mds_from_args(
            output_folder=out,
            input_folder=source,
            compression=None,
            concat_tokens=int(seq_len),
            tokenizer_name=tokenizer,
            bos_text=None,
            eos_text=eos,
            use_tokenizer_eos=False,
            no_wrap=False,
            processes=int(processes),
            reprocess=False,
            trust_remote_code=False,
            logging_level="WARNING",
        )


if __name__ == "__main__":
    main()
