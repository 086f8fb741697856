# Every stage of the pipeline as one rule, with the names and commands of dvc.yaml.
#
#   snakemake --cores all reports/digits_fid.json

import sys

from drift.errors import InputError
from pipeline import params as sections


configfile: "params.yaml"


try:
    PARAMS = sections.load("params.yaml")
except InputError as mistake:
    sys.exit(f"error: {mistake}")
if config != sections.read("params.yaml"):
    sys.exit(
        "error: stages read params.yaml itself: edit it (or use `dvc exp run -S`) in place of --config"
    )


# Library files by stage: Snakemake tracks commands, not imports, so a changed file must be an input.
LIBRARY = {
    "shard": [
        "drift/data/shards.py",
        "drift/data/sources.py",
    ],
    "train_tokenizer": [
        "drift/tokenizer.py",
        "drift/pretraining.py",
        "drift/data/stream.py",
        "drift/data/shards.py",
        "drift/data/sources.py",
    ],
    "cache_latents": [
        "drift/tokenizer.py",
        "drift/data/latents.py",
        "drift/data/shards.py",
        "drift/data/sources.py",
    ],
    "pretrain_encoder": [
        "drift/encoders/mae.py",
        "drift/pretraining.py",
        "drift/data/stream.py",
        "drift/data/latents.py",
        "drift/data/shards.py",
    ],
    "train_judge": [
        "drift/metrics/judge.py",
        "drift/pretraining.py",
        "drift/data/stream.py",
        "drift/data/shards.py",
        "drift/data/sources.py",
    ],
    "train": [
        "drift/training.py",
        "drift/objective.py",
        "drift/checkpoints.py",
        "drift/field.py",
        "drift/loss.py",
        "drift/guidance.py",
        "drift/features.py",
        "drift/queue.py",
        "drift/generator.py",
        "drift/encoders/mae.py",
        "drift/data/stream.py",
        "drift/data/latents.py",
        "drift/data/shards.py",
    ],
    "sample": [
        "drift/sampling.py",
        "drift/generator.py",
        "drift/tokenizer.py",
    ],
    "evaluate": [
        "drift/metrics/evaluation.py",
        "drift/metrics/distribution.py",
        "drift/metrics/restoration.py",
        "drift/metrics/latency.py",
        "drift/metrics/judge.py",
        "drift/sampling.py",
        "drift/generator.py",
        "drift/tokenizer.py",
        "drift/data/shards.py",
        "drift/data/sources.py",
        "pipeline/figures.py",
    ],
}


def code(stage):
    return [f"pipeline/{stage}.py", *LIBRARY[stage]]


def resolved(kind, name):
    """The section of params.yaml that a job reads, so that a changed parameter reruns what depends on it."""
    return sections.lookup(
        getattr(PARAMS, kind), name, kind.removesuffix("s")
    ).model_dump()


def experiment(wildcards):
    return sections.run_of(PARAMS, wildcards.run)


def parts(folder):
    """The parallel jobs of a dataset's `parts:`; with one part the gathering job does all."""

    def inputs(wildcards):
        n = PARAMS.datasets[wildcards.dataset].parts
        made = folder.format(**wildcards)
        return (
            [f"{made}.parts/{i}-of-{n}.json" for i in range(1, n + 1)] if n > 1 else []
        )

    return inputs


shell.prefix("export DRIFT_RUNNER=snakemake; ")


wildcard_constraints:
    run=r"[^/_]+",
    dataset=r"[^/_.]+",
    tokenizer=r"[^/_.]+",
    encoder=r"[^/_.]+",
    judge=r"[^/_.]+",
    part=r"\d+",
    parts=r"\d+",


localrules:
    all,


rule all:
    input:
        f"reports/{PARAMS.experiment}_fid.json",


rule shard_part:
    input:
        code=code("shard"),
    output:
        "data/{dataset}/shards.parts/{part}-of-{parts}.json",
    log:
        "logs/shard/{dataset}-{part}-of-{parts}.log",
    benchmark:
        "logs/benchmarks/shard-{dataset}-{part}-of-{parts}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=240,
        gpu=0,
    params:
        section=lambda w: resolved("datasets", w.dataset),
        folder="data/{dataset}/shards",
    shell:
        "python -m pipeline.shard --dataset {wildcards.dataset} --output {params.folder} "
        "--part {wildcards.part}/{wildcards.parts} 2>&1 | tee {log}"


rule shard:
    input:
        parts=parts("data/{dataset}/shards"),
        code=code("shard"),
    output:
        "data/{dataset}/shards/index.json",
    log:
        "logs/shard/{dataset}.log",
    benchmark:
        "logs/benchmarks/shard-{dataset}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=240,
        gpu=0,
    params:
        section=lambda w: resolved("datasets", w.dataset),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m pipeline.shard --dataset {wildcards.dataset} --output {params.folder} 2>&1 | tee {log}"


rule train_tokenizer:
    input:
        shards=lambda w: f"data/{resolved('tokenizers', w.tokenizer)['dataset']}/shards/index.json",
        code=code("train_tokenizer"),
    output:
        "models/tokenizers/{tokenizer}/index.json",
    log:
        "logs/train_tokenizer/{tokenizer}.log",
    benchmark:
        "logs/benchmarks/train_tokenizer-{tokenizer}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 16
    resources:
        mem_mb=6000,
        runtime=240,
        gpu=1,
    params:
        section=lambda w: resolved("tokenizers", w.tokenizer),
        shards=subpath(input.shards, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m pipeline.train_tokenizer --tokenizer {wildcards.tokenizer} --shards {params.shards} "
        "--output {params.folder} 2>&1 | tee {log}"


rule cache_latents_part:
    input:
        shards="data/{dataset}/shards/index.json",
        tokenizer="models/tokenizers/{tokenizer}/index.json",
        code=code("cache_latents"),
    output:
        "data/{dataset}/latents/{tokenizer}.parts/{part}-of-{parts}.json",
    log:
        "logs/cache_latents/{dataset}-{tokenizer}-{part}-of-{parts}.log",
    benchmark:
        "logs/benchmarks/cache_latents-{dataset}-{tokenizer}-{part}-of-{parts}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 2
    resources:
        mem_mb=6000,
        runtime=720,
        gpu=1,
    params:
        flip=lambda w: PARAMS.datasets[w.dataset].flip,
        shards=subpath(input.shards, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
        folder="data/{dataset}/latents/{tokenizer}",
    shell:
        "python -m pipeline.cache_latents --dataset {wildcards.dataset} --shards {params.shards} "
        "--tokenizer {params.tokenizer} --output {params.folder} "
        "--part {wildcards.part}/{wildcards.parts} 2>&1 | tee {log}"


rule cache_latents:
    input:
        shards="data/{dataset}/shards/index.json",
        tokenizer="models/tokenizers/{tokenizer}/index.json",
        parts=parts("data/{dataset}/latents/{tokenizer}"),
        code=code("cache_latents"),
    output:
        "data/{dataset}/latents/{tokenizer}/index.json",
    log:
        "logs/cache_latents/{dataset}-{tokenizer}.log",
    benchmark:
        "logs/benchmarks/cache_latents-{dataset}-{tokenizer}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 16
    resources:
        mem_mb=6000,
        runtime=720,
        gpu=1,
    params:
        flip=lambda w: PARAMS.datasets[w.dataset].flip,
        shards=subpath(input.shards, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m pipeline.cache_latents --dataset {wildcards.dataset} --shards {params.shards} "
        "--tokenizer {params.tokenizer} --output {params.folder} 2>&1 | tee {log}"


rule pretrain_encoder:
    input:
        latents=lambda w: "data/{dataset}/latents/{tokenizer}/index.json".format(
            **resolved("encoders", w.encoder)
        ),
        code=code("pretrain_encoder"),
    output:
        "models/encoders/{encoder}/index.json",
    log:
        "logs/pretrain_encoder/{encoder}.log",
    benchmark:
        "logs/benchmarks/pretrain_encoder-{encoder}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 16
    resources:
        mem_mb=8000,
        runtime=2880,
        gpu=1,
    params:
        section=lambda w: resolved("encoders", w.encoder),
        latents=subpath(input.latents, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m pipeline.pretrain_encoder --encoder {wildcards.encoder} --latents {params.latents} "
        "--output {params.folder} 2>&1 | tee {log}"


rule train_judge:
    input:
        shards=lambda w: f"data/{resolved('judges', w.judge)['dataset']}/shards/index.json",
        code=code("train_judge"),
    output:
        "models/judges/{judge}/index.json",
    log:
        "logs/train_judge/{judge}.log",
    benchmark:
        "logs/benchmarks/train_judge-{judge}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 16
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=1,
    params:
        section=lambda w: resolved("judges", w.judge),
        shards=subpath(input.shards, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m pipeline.train_judge --judge {wildcards.judge} --shards {params.shards} "
        "--output {params.folder} 2>&1 | tee {log}"


rule train:
    input:
        latents=lambda w: "data/{e.dataset}/latents/{e.tokenizer}/index.json".format(
            e=experiment(w)
        ),
        encoder=lambda w: f"models/encoders/{experiment(w).encoder}/index.json",
        tokenizer=lambda w: f"models/tokenizers/{experiment(w).tokenizer}/index.json",
        code=code("train"),
    output:
        "models/generators/{run}/index.json",
    log:
        "logs/train/{run}.log",
    benchmark:
        "logs/benchmarks/train-{run}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 16
    resources:
        mem_mb=8000,
        runtime=2880,
        gpu=1,
    params:
        section=lambda w: experiment(w).model_dump(include={"generator", "train"}),
        latents=subpath(input.latents, parent=True),
        encoder=subpath(input.encoder, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m pipeline.train --run {wildcards.run} --latents {params.latents} --encoder {params.encoder} "
        "--tokenizer {params.tokenizer} --checkpoints checkpoints/{wildcards.run} --output {params.folder} "
        "2>&1 | tee {log}"


rule sample:
    input:
        generator="models/generators/{run}/index.json",
        code=code("sample"),
    output:
        samples="samples/{run}/samples.npz",
        grid=report(
            "samples/{run}/grid.png",
            caption="docs/captions/samples.rst",
            category="{run}",
        ),
    log:
        "logs/sample/{run}.log",
    benchmark:
        "logs/benchmarks/sample-{run}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 16
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=1,
    params:
        section=lambda w: experiment(w).sample.model_dump(),
        generator=subpath(input.generator, parent=True),
        folder=subpath(output.samples, parent=True),
    shell:
        "python -m pipeline.sample --run {wildcards.run} --generator {params.generator} --output {params.folder} "
        "2>&1 | tee {log}"


rule evaluate:
    input:
        samples="samples/{run}/samples.npz",
        generator="models/generators/{run}/index.json",
        judge=lambda w: f"models/judges/{experiment(w).judge}/index.json",
        shards=lambda w: f"data/{experiment(w).dataset}/shards/index.json",
        code=code("evaluate"),
    output:
        metrics=report(
            "reports/{run}_fid.json",
            caption="docs/captions/metrics.rst",
            category="{run}",
        ),
        grid="reports/{run}_fid_grid.png",
        progress=report(
            "reports/{run}_fid_progress.png",
            caption="docs/captions/progress.rst",
            category="{run}",
        ),
        curves=report(
            "reports/{run}_fid_curves.png",
            caption="docs/captions/curves.rst",
            category="{run}",
        ),
        alpha=report(
            "reports/{run}_fid_alpha.png",
            caption="docs/captions/alpha.rst",
            category="{run}",
        ),
        nearest=report(
            "reports/{run}_fid_nearest.png",
            caption="docs/captions/nearest.rst",
            category="{run}",
        ),
    log:
        "logs/evaluate/{run}.log",
    benchmark:
        "logs/benchmarks/evaluate-{run}.tsv"
    conda:
        "envs/drift.yaml"
    threads: 16
    resources:
        mem_mb=6000,
        runtime=240,
        gpu=1,
    params:
        section=lambda w: experiment(w).evaluate.model_dump(),
        generator=subpath(input.generator, parent=True),
        judge=subpath(input.judge, parent=True),
        shards=subpath(input.shards, parent=True),
    shell:
        "python -m pipeline.evaluate --run {wildcards.run} --samples {input.samples} --generator {params.generator} "
        "--judge {params.judge} --shards {params.shards} --output {output.metrics} 2>&1 | tee {log}"
