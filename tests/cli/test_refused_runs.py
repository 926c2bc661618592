"""Requests of `cl run` that are refused: the words, and below them what the sentence says."""

from __future__ import annotations

from collections.abc import Callable

REFUSED = r"""
# names
stream=permuted_mnits
    no stream 'permuted_mnits' (did you mean permuted_mnist?); there are blurry
strategy=reply
    no strategy 'reply' (did you mean replay?); there are agem
strategy=[replay,derp]
    no strategy 'derp' (did you mean derpp?)
backbone=transformer9
    no backbone 'transformer9' (did you mean transformer?); there are armt
backbone=titans
    ; titans is a rule of neural_memory: backbone=gpt 'backbone.blocks=neural_memory(rule=titans)'
backbone=swiglu
    ; swiglu is an MLP: backbone=gpt 'backbone.mlp=swiglu'
backbone=attention
    ; attention is a mixer: backbone=gpt 'backbone.blocks=attention'
backbone=lstm
    ; lstm is a cell of nonlinear_rnn: backbone=gpt 'backbone.blocks=nonlinear_rnn(cell=lstm)'
backbone=gateloop
    (rule=gateloop)', or a cell of scan_rnn: backbone=gpt 'backbone.blocks=scan_rnn(cell=gateloop)'
schedule=square
    no schedule 'square'; there are autoregressive
+experiment=nothing
    no experiment 'nothing'; there are builtin_text
sed=1
    no setting 'sed' (did you mean seed?); there are seed, limit_experiences
data.rot=x
    no setting 'data.rot' (did you mean root?); there are root, download
seed.x=1
    no setting 'seed.x'
+experiments=demo
    no setting 'experiments'; there are stream, strategy
strategy=replay strategy.replay.capasity=5
    strategy.replay has no option 'capasity'; its options are capacity
strategy.derpp.alpha=0.5
    strategy.derpp was not selected
trainer.epoch=5
    trainer has no option 'epoch'; its options are epochs
optimizer.momentun=0.9
    optimizer has no option 'momentun'
debug=null
    there is no debug 'null'; there are overfit, tiny
--config-name walk
    there is no config 'walk'; there are compare, run
# names that Hydra reads as something else
strategy=3
    there is no strategy '3'; there are agem
stream=[]
    there is no stream '[]'; there are blurry
stream=power_law stream@stream.base=3
    there is no stream '3'; there are blurry
# words that are no setting, two for one, several values for one; Hydra's flags
seed=0 optimizer.lr=0.1 seed=1
    cl: 'seed=0' and 'seed=1' both set seed; give one of them
=3
    '=3' is no setting; settings are written name=value
seed=((
    'seed=((' is no setting; settings are written name=value
--nonsense
    cl: unrecognized arguments: --nonsense; `cl run --hydra-help` shows
--cfg
    cl: argument --cfg/-c: expected one argument
--cfg jobs
    cl: argument --cfg/-c: invalid choice: 'jobs'
out=a hydra.run.dir=b
    cl: 'out=a' and 'hydra.run.dir=b' both name the folder; give one of them
-m out=a hydra.sweep.dir=b
    cl: 'out=a' and 'hydra.sweep.dir=b' both name the folder; give one of them
seed=0,1
    cl: 'seed=0,1' gives several values; write a list in brackets, or sweep over them with `cl run -m seed=0,1`
strategy.derpp.alpha=1,2
    cl: 'strategy.derpp.alpha=1,2' gives several values; write a list in brackets, or sweep over
# values
trainer.max_steps=many
    trainer.max_steps is 'many'; it must be an integer
trainer.batch_size=-1
    trainer.batch_size is -1
trainer.precision=fp64
    trainer.precision is 'fp64'; it must be one of fp32, bf16
trainer.device=tpu9
    trainer.device is 'tpu9'
trainer.clip_norm=0
    trainer.clip_norm is 0; it must be positive
seed=-1
    seed is -1; it must be an integer of at least 0
seed=one
    seed is 'one'; it must be an integer
optimizer.lr=fast
    optimizer.lr is 'fast'; it must be a number
optimizer.lr=[0.1]
    optimizer.lr is [0.1]; it must be a number
optimizer.lr=true
    optimizer.lr is True; it must be a number
optimizer=adam optimizer.betas=0.9
    optimizer.betas is 0.9; it must be a list
optimizer.foreach=no
    optimizer.foreach is 'no'; it must be true
stream=power_law stream.base.num_experiences=0
    stream.base.num_experiences is 0; it must be
backbone=recurrent backbone.kind=[gru]
    backbone.kind is ['gru']; it must be a name
backbone=snn backbone.threshold=x
    backbone.threshold is 'x'; it must be a number
seed=true
    seed is True; it must be an integer of at least 0
stream.seed=one
    stream.seed is 'one'; it must be an integer
limit_experiences=true
    limit_experiences is True; it must be an integer
trainer.max_steps=[]
    trainer.max_steps is []; it must be an integer of at least 1, or a list of one for each experience
schedule=autoregressive schedule.starts=[]
    schedule.starts is []; it must rise from 0
schedule=infinite schedule.timescale=[2]
    schedule.timescale is [2]; it must be a
stream.num_experiences=0
    stream.num_experiences is 0
stream=power_law stream.ratio=1.5
    stream.ratio is 1.5; it must be above 0 and at most 1, since an old experience has no more rows than a new
stream=power_law stream.exponent=-1
    stream.exponent is -1; it must be a finite number of at least 0
stream=scole_digits stream.perturbation=rain
    it must be one of random, none
backbone=convnet backbone.head=cosine
    it must be one of linear, weight_norm
limit_experiences=0
    limit_experiences is 0
# what does not fit together
trainer.epochs=1
    a budget is exactly one of epochs, max_steps, max_tokens
stream.setting=class_incremental
    stream.setting is 'class_incremental'; it must be one of domain_incremental
stream=split_digits stream.num_experiences=11
    11
strategy=replay strategy.replay.capacity=0
    capacity
strategy=replay strategy.replay.policy=random
    'random'
strategy=derpp strategy.derpp.capacity=5 strategy.derpp.replay_batch_size=10
    derpp.replay_batch_size is 10; it must be at most derpp.capacity, 5
strategy=[replay,fpf] strategy.fpf.buffer_of=replay strategy.replay.capacity=5
    fpf.replay_batch_size is 32; it must be at most the capacity of the buffer of replay, 5
stream=power_law stream.buffer_rows=40
    stream.buffer_rows is 40, less than one batch; it must be at least trainer.batch_size=64
strategy=kfpf strategy.kfpf.modules=[nothing,head]
    has 'nothing', which matches no module with parameters; the model's modules are head (Linear), body.1
strategy=update_periods 'strategy.update_periods.periods={nothing.*: 2}'
    update_periods.periods names 'nothing.*', which fits no parameter; there are
strategy=[refresh,replay] strategy.refresh.mode=paper
    and replay behind it changes the batch; put refresh last, as in strategy=[replay,refresh]
strategy=[ewc,fpf] strategy.fpf.buffer_of=ewc
    fpf.buffer_of is 'ewc'; it must be a strategy that keeps a buffer beside fpf (no strategy of this run)
strategy=refresh strategy.refresh.mode=paper strategy.refresh.damping=0
    refresh.damping is 0; it must be above 0 in paper mode, since there is no Fisher estimate yet in the first
strategy=refresh strategy.refresh.mode=paper limit_experiences=1
    which goes by the Fisher information of earlier experiences, and stream permuted_digits has one experience
stream=view_batch stream.views=3
    stream.views is 3, which does not divide trainer.batch_size=64; views of a row must share a batch
stream=view_batch stream.remainder=refuse
    stream.views is 4, which does not divide the 290 rows of experience 0 ('classes 0 1'); let
# data
stream=permuted_mnist data.root=null
    data set mnist needs data.root
stream=permuted_mnist data.root=/nowhere
    '/nowhere', which is not
stream=split_mnist data.root=.
    train-images-idx3-ubyte
# targets
+strategy.mine._target_=os.system
    strategy.mine._target_ is 'os.system', which makes no strategy; it must be a subclass of cl.hooks.Strategy
+strategy.mine._target_=nowhere.Mine
    'nowhere.Mine' cannot be imported
# stores
tracking.uri=http://127.0.0.1:9
    does not answer
tracking.uri=ftp://x
    ftp
tracking.uri=3
    tracking.uri is 3; it must be a name
tracking.every_steps=often
    cl: tracking.every_steps is 'often'; it must be an integer of at least 1
"""


def test_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, is_refused: Callable[[tuple[str, ...], str], None]
) -> None:
    # a flag without its value would take the next word for it
    short = ("tracking=none", "debug=tiny") if words != ["--cfg"] else ()
    short = [each for each in short if not any(word.startswith(each[:5]) for word in words)]
    is_refused(("run", *short, *words), sentence)
