"""Training: rounds of on-policy self-distillation. Each stage is a task; its manifest records that it is done."""

from __future__ import annotations

from prefect import flow

from ogls.config import RunConfig
from ogls.stages.health import raise_if_stopped
from ogls.stages.resume import is_last_round, is_trained, resume_round
from tasks.publish import publish, write_report
from tasks.retention import drop_old
from tasks.session import session
from tasks.stages import evaluate, health, prepare, sample, steer, style, teach, train, verify


@flow(name="train", flow_run_name="train {config.name}", log_prints=False)
def train_flow(config: RunConfig) -> None:
    """Train with OGLS-SD (arXiv 2605.12400), or with the related method that the configuration selects.

    Finished rounds are not repeated: running the flow again continues in the round where the last flow run ended.
    """
    with session(config, "train") as run:
        prepare(config, 0)
        for r in range(resume_round(run), config.rounds + 1):  # round 0 is the evaluation before training
            if not is_trained(run, r):
                sample(config, r)  # G rollouts of every problem from the policy of round r - 1
                verify(config, r)  # correct, failed, or undecided
                if config.has_teacher:  # GRPO and fine-tuning have no teacher
                    teach(config, r)  # mean teacher states with no exemplar, correct exemplars, incorrect exemplars
                    steer(config, r)  # target = softmax(z_base + lambda * (z_correct - z_incorrect))
                    if config.style.enabled:
                        style(config, r)  # how much of the steering is style, how much substance
                train(config, r)  # minimise D(target, student): the policy of round r
            if r % config.evaluate.every == 0 or r == config.rounds:
                evaluate(config, r, ahead=True)  # several devices sample the rollouts of round r + 1 beside it
                health(config, r)  # continue, warn, stop, or roll back to the best round
            if is_last_round(run, r):
                write_report(config)  # one HTML page about the run
            publish(config, r)
            drop_old(config, r)  # teacher states and optimizer states that no later round needs
            raise_if_stopped(run, r)
