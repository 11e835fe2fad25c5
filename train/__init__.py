# SPDX-License-Identifier: Apache-2.0
"""Services around a variant, each called from its `train.py` in a line or two; and commands, `python -m train.<name>`.

commands      run (knobs, stopping, prove_resume), plan, report, evaluate, sample, lm_eval, checkpoint; command
executor      executor: steps that run once; executor_{steps,status,run}; run_step: a variant as a step
launcher      launch: a command on a cluster; launch_{job,ray,slurm,xpk}
a run         rundir, config, mesh, shapes, optimizer, offload, compiled, profile, progress
data          data_config: sources or corpus, tokenizer, token_cache, data, mixture, batches; lev_examples
evaluation    evaluate, evaluate_saved, saved; sample, generate; harness, harness_{model,packing,tasks}, held_out_tasks
checkpoints   checkpoint: when, and what stays; checkpoint_{io,read,arrays,layout,files,lock,commands}
metrics       metrics, tracker, watch, tree_stats, spikes, stalls, store_metrics
endings       outcome, summary, history; report, report_watch, compare, page, plot
failures      failure, failure_{bundle,batch,norms,replay,facts,page}, stall
Levanter      lev, the only door to it
"""
