//! Examples at the end of each help text. A test parses every one of them.

/// Of `lowbit --help`.
pub const TOP: &str = "Examples:
  See what it does, with nothing but this program (out/report.html):
    lowbit run demo -o out
  What would happen to every tensor, and the exact size; nothing is written:
    lowbit plan org/model --scheme w4a16 --group-size 128
  Quantize, verify, compare with the original on text and tasks, time, judge, report:
    lowbit run org/model -o out --calib c4.jsonl --eval-text wiki.raw --tasks arc_easy,hellaswag
  In CI: exit code 0 pass, 1 regression, 2 inconclusive:
    lowbit eval out/model --reference org/model --tasks mine.yaml -o eval.json
    lowbit gate eval.json --markdown comment.md -o gate.json
  Serve it, load it, and see how many servers a peak needs:
    lowbit serve out/model --port 8000
    lowbit load http://127.0.0.1:8000 --find-max --slo guidellm/chatbot --data chat -o out/load.json
    lowbit capacity out/load.json=out/gate.json --peak-rps 120 --gpu-hour 3.5
  Several results in one page:
    lowbit report w8 w4 w3 -o comparison

MODEL is a folder, a .gguf file, `demo`, or a hub id `org/name[@revision]`.
Exit codes: 0 done; 1 a regression or a broken objective; 2 no verdict; 3 bad input; 4 internal failure; 130 interrupted.";

/// Of `lowbit run --help`.
pub const RUN: &str = "Examples:
  lowbit run demo -o out
  lowbit run org/model -o out --calib c4.jsonl --eval-text wiki.raw
  lowbit run org/model -o out --method best --calib c4.jsonl --tasks arc_easy,mmlu:5 --data tasks --margin 1
  lowbit run model.gguf -o out --scheme w8a16 --calib self --no-bench

The same command again goes on where it stopped. With --tasks, --margin, --max-kl or --max-ppl-ratio the exit code is the gate's.";

/// Of `lowbit plan --help`.
pub const PLAN: &str = "Examples:
  lowbit plan org/model
  lowbit plan org/model --scheme w4a16 --group-size 64 --ignore re:.*down_proj";

/// Of `lowbit quantize --help`.
pub const QUANTIZE: &str = "Examples:
  lowbit quantize org/model -o out/model --calib c4.jsonl
  lowbit quantize org/model -o out/model --method best --scheme w3a16 --asymmetric --calib chats.jsonl --samples 256
  lowbit quantize org/model -o out/model --method rtn --scheme w8a16 --group-size channel";

/// Of `lowbit eval --help`.
pub const EVAL: &str = "Examples:
  lowbit eval org/model --ppl wiki.raw --protocol gptq-2048
  lowbit eval out/model --reference org/model --kl wiki.raw --worst-tokens 10 --blame linear
  lowbit eval out/model --reference org/model --tasks arc_easy,mmlu:5,mine.yaml --data tasks -o eval.json
  lowbit eval org/model --tasks gsm8k --limit 20 --render";

/// Of `lowbit gate --help`.
pub const GATE: &str = "Examples:
  lowbit gate eval.json -o gate.json
  lowbit gate candidate.json baseline.json --margin 0.5 --junit gate.xml --markdown gate.md
  lowbit gate eval.json --max-kl 0.05 --max-ppl-ratio 1.03
  lowbit gate --simulate --items 10000,2000 --discordant 0.05 --loss 0.3 --margin 0.5";

/// Of `lowbit bench --help`.
pub const BENCH: &str = "Examples:
  lowbit bench org/model --draft out/model
  lowbit bench out/model --reference org/model -p 512 -n 128 -b 1,4 -o bench.json
  lowbit bench --synthetic llama-3.1-8b --device cuda -b 1,16 --depth 4096";

/// Of `lowbit load --help`.
pub const LOAD: &str = "Examples:
  lowbit load http://127.0.0.1:8000 --profile sweep --data chat --slo guidellm/chatbot -o load.json
  lowbit load http://127.0.0.1:8000 --profile poisson:2,4,8 --duration 60 --data mine.jsonl
  lowbit load http://127.0.0.1:8000 --find-max --slo ttft_p95<=300,itl_p95<=50
  lowbit load --import guidellm.json --slo guidellm/chatbot -o load.json
  lowbit load --import load.json --as vllm";

/// Of `lowbit capacity --help`.
pub const CAPACITY: &str = "Examples:
  lowbit capacity --estimate --model 8b,70b --gpu h200 --data chat
  lowbit capacity bf16.json w4.json=gate.json --peak-rps 120 --gpu-hour 3.5 -o capacity.json";

/// Of `lowbit serve --help`.
pub const SERVE: &str = "Examples:
  lowbit serve out/model --port 8000
  lowbit serve org/model --draft out/model --served-name model --api-key-env KEY";

/// Of `lowbit report --help`.
pub const REPORT: &str = "Examples:
  lowbit report out
  lowbit report w8 w4 w3 -o comparison";

/// Of `lowbit completions --help`.
pub const COMPLETIONS: &str = "Examples:
  lowbit completions bash > ~/.local/share/bash-completion/completions/lowbit
  lowbit completions zsh > ~/.zfunc/_lowbit
  lowbit completions fish > ~/.config/fish/completions/lowbit.fish";

/// Of `lowbit man --help`.
pub const MAN: &str = "Examples:
  lowbit man | man -l -
  lowbit man -o ~/.local/share/man/man1";

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn every_example_parses() {
        let texts = [TOP, RUN, PLAN, QUANTIZE, EVAL, GATE, BENCH, LOAD, CAPACITY, SERVE, REPORT, COMPLETIONS, MAN];
        let mut seen = 0;
        for line in texts.iter().flat_map(|t| t.lines()).map(str::trim).filter(|l| l.starts_with("lowbit ")) {
            // What the shell does with the output is not the program's.
            let words = line.split_whitespace().take_while(|w| !["|", ">"].contains(w));
            if let Err(e) = Cli::try_parse_from(words) {
                panic!("{line}: {e}");
            }
            seen += 1;
        }
        assert!(seen > 30, "{seen}");
    }
}
