"""What ``--help`` teaches: each verb in a sentence and by examples."""

MODEL = "a directory, a hub id, a .gguf file, or smollm2 (the packaged one)"
ABOUT = """\
Prune neural networks, large language models first.

  secateur inspect smollm2                       what it is made of, what can be pruned
  secateur prune smollm2 -o out/half --space weight --score wanda --sparsity 0.5
  secateur prune smollm2 -o out/slim --space ffn --score wanda --keep 75%
  secateur measure smollm2 out/half out/slim     what it cost
  secateur report out/slim                       the page, redrawn from report.json"""
INSPECT = """\
Print a model's anatomy: spaces and their sizes, parameters, MACs and KV bytes per token, and
what cannot be pruned and why. Only config.json is read.

  secateur inspect smollm2
  secateur inspect ./my-model --check            prove it on a toy copy; exit 0 only if proved
  secateur inspect ./my-model --json | jq .spaces"""
PRUNE = """\
Prune a model and write a checkpoint that loads, with a report of what it cost.

  half of the weights, SparseGPT:
    secateur prune smollm2 -o out/half --space weight --method sparsegpt --sparsity 0.5
  two of every four weights, Wanda:
    secateur prune smollm2 -o out/2of4 --space weight --score wanda --grain 2:4
  the same, and what stays takes over what went:
    secateur prune smollm2 -o out/2of4-mended --space weight --score wanda --grain 2:4 --repair least_squares
  the best weights to keep that we know, in about 12 dense passes over the text:
    secateur prune smollm2 -o out/best --space weight --sparsity 0.6 --effort balanced
  three quarters of the FFN neurons, really cut:
    secateur prune smollm2 -o out/slim --space ffn --score wanda --keep 0.75
  six layers fewer of thirty, by block influence:
    secateur prune smollm2 -o out/short --space layer --score block_influence --keep 24
  as many FFN neurons fewer as makes the model a tenth smaller:
    secateur prune smollm2 -o out/fit --space ffn --score wanda --target params=-10%
  the largest sparsity with at most 5 % worse perplexity:
    secateur prune smollm2 -o out/safe --space weight --score wanda --at-most-worse 5%
  what it will need, before anything heavy:
    secateur prune smollm2 -o out/half --space weight --score wanda --sparsity 0.5 --dry-run
  several steps from a file, with fewer windows than it says:
    secateur prune --recipe recipes/ffn-then-weights.yaml --samples 16

A run that was stopped goes on with the same command and --resume."""
PLAN = """\
Decide what stays and write only the plan (one bit per unit), to look at or to replay.

  secateur plan smollm2 -o out/plan --space ffn --score wanda --keep 0.75
  secateur prune ./sibling -o out/sibling --plan out/plan/plan.safetensors"""
MEASURE = """\
Measure models side by side; the first is the reference for differences.

  secateur measure smollm2 out/half --latency
  secateur measure smollm2 out/half --text wikitext2-test.txt --windows 64 --dtype bf16 --json
  secateur measure smollm2 out/half --choices piqa-dev.jsonl"""
RUN = """\
Continue a prompt, greedily. A packed model runs on the kernels that skip zeros, a plain one in untouched
Transformers.

  secateur run out/half-packed --prompt "The capital of France is"
  secateur run smollm2 --prompt "The capital of France is" --max-new-tokens 32 --dtype bf16 --json"""
BENCH = """\
Time models side by side, taking turns: the prompt, the first token, each token after it, and memory. Ratios
are to the first model. Plain models run in untouched Transformers, packed ones on our kernels.

  secateur bench smollm2 out/half-packed --dtype bf16
  secateur bench smollm2 out/half-packed --own-kernel    the dense model on our dense kernel, too: what
                                                         remains is what skipping zeros gains
  secateur bench smollm2 out/half-packed --batch 1,2,8 --prompt-tokens 16,512 --threads 2 --json"""
PACK = """\
Write a model with its zeros left out: smaller files, and faster on CPU, where `secateur.load` and
`secateur run` skip the zeros. Half of the weights zero, in bf16: 9/16 of the matrices' bytes.
Other tools cannot read the result; `unpack` gives back an ordinary checkpoint.

  secateur pack out/half -o out/half-packed                    bf16
  secateur pack out/half -o out/half-packed --dtype int8       codes and a scale per row
  secateur prune smollm2 -o out/half --space weight --score wanda --sparsity 0.5 --pack"""
UNPACK = """\
Write a packed model as an ordinary checkpoint, exactly: bit for bit what was packed, in the dtype it
was packed in (int8: codes times scales, in fp32).

  secateur unpack out/half-packed -o out/half-again"""
REPORT = """\
Redraw report.html from report.json, the truth.

  secateur report out/half"""
