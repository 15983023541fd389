"""``onenet-worker pause``, ``resume`` and ``probe``."""

from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.terminal import interruptible, local_time, note, print_json, print_line, print_rows
from worker.errors import EXIT_FAILURE
from worker.printable import printable

if TYPE_CHECKING:
    from worker.admin.pauses import Operator
    from worker.amqp.control_client import Answers
    from worker.core.pauses import Order, ProductState, WorkerReport

Product = Annotated[str | None, typer.Option("--product", metavar="NAME", help="One product; without it: all.")]
Default = Annotated[bool, typer.Option("--default-product", help="Only the product of commands that name none.")]
By = Annotated[
    str | None, typer.Option("--by", metavar="NAME", help="Who asks, for the logs; default: this user and machine.")
]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for the logs and for those who wonder.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def pause(
    product: Product = None, default: Default = False, by: By = None, reason: Reason = "", as_json: AsJson = False
) -> None:
    """Have all workers send nothing, not even probes, until `resume`; commands wait, and those that expire fail.

    It holds for all workers of the namespace, also for those that start later, and is logged with who asked. The exit
    code is 1 if a worker that takes commands has not answered, because it may send until it does. Example:

        onenet-worker pause --product heating --reason "maintenance until 18:00"
    """
    scope = _scope(product, default)
    with interruptible("the order may be in force: onenet-worker check says what is paused"):
        answers = _operator(by).pause(scope, reason)
    silent = "they may send until the order reaches them; onenet-worker check says what is paused"
    _print(answers, "ordered to pause", scope, as_json=as_json, ended="replaced", silent=silent)
    if answers.silent:
        raise typer.Exit(EXIT_FAILURE)


def resume(
    product: Product = None, default: Default = False, by: By = None, reason: Reason = "", as_json: AsJson = False
) -> None:
    """End what `pause` began. Without --product or --default-product it ends all pauses, also those of single products.

    What workers have paused by themselves, because OneNET fails, is probed at once. Example:

        onenet-worker resume --product heating
    """
    scope = _scope(product, default)
    with interruptible("the order may be in force: onenet-worker check says what is paused"):
        answers = _operator(by).resume(scope, reason)
    _print(answers, "ordered to resume", scope, as_json=as_json, silent="they go on when the order reaches them")
    if not answers.ended:
        note("nothing was paused by hand, so that only what workers have paused by themselves is probed")


def probe(product: Product = None, default: Default = False, by: By = None, as_json: AsJson = False) -> None:
    """Have products that workers have paused by themselves probed at once, instead of after the next interval.

    The probe is the next command that waits; if OneNET answers it, the product is resumed. Example:

        onenet-worker probe
    """
    scope = _scope(product, default)
    with interruptible("the workers may probe all the same"):
        answers = _operator(by).probe(scope)
    unanswered = "nothing was probed, as far as is known"
    _print(answers, "ordered to probe", scope, as_json=as_json, silent="they may probe nothing", unanswered=unanswered)
    if not any(_has_scope(report, scope) for report in answers.reports):
        raise typer.Exit(EXIT_FAILURE)
    if as_json:
        return
    states = [state for report in answers.reports for state in report.products if _is_of(state, scope)]
    if any(state.is_paused for state in states):
        note("the next command of each is the probe: onenet-worker check says later what came of it")
    else:
        note("nothing is paused, so that there is nothing to probe")


def _scope(product: str | None, default: bool) -> str | None:
    from worker.core.command import MAX_PRODUCT_CHARS
    from worker.core.pauses import DEFAULT_PRODUCT

    if product is not None and default:
        raise typer.BadParameter("--product and --default-product: use one or the other")
    if product is not None and not 0 < len(product) <= MAX_PRODUCT_CHARS:
        raise typer.BadParameter(f"--product: must be 1 to {MAX_PRODUCT_CHARS} characters")
    return DEFAULT_PRODUCT if default else product


def _operator(by: str | None) -> "Operator":
    from worker.admin.pauses import Operator, this_person
    from worker.cli.settings import read_settings

    settings = read_settings()
    return Operator(settings.broker_address, settings.topology, by or this_person())


def _print(
    answers: "Answers",
    what: str,
    scope: str | None,
    *,
    as_json: bool,
    silent: str,
    ended: str = "ended",
    unanswered: str = "one that starts, or has its connection again, will know it",
) -> None:
    from worker.admin.pauses import answers_document, described, resume_command

    if as_json:
        print_json(answers_document(answers))
    else:
        print_line(f"{what}: {printable(described(scope))}")
        for order in answers.ended:
            print_line(f"{ended} the pause of {_pause(order)}")
        for order in answers.pauses.orders:
            print_line(f"paused by hand: {_pause(order)}")
        _print_workers(answers)
    if answers.silent:
        note(f"workers that have not answered: {answers.silent} of {answers.consumers}; {silent}")
    elif not answers.reports:
        note(f"no worker has answered; {unanswered}")
    if answers.reports and scope and not any(_has_scope(report, scope) for report in answers.reports):
        known = sorted({state.product or "" for report in answers.reports for state in report.products} - {""})
        others = f"they have {', '.join(known)}" if known else "they have only the default one"
        undo = f"; undo it with {resume_command(scope)}" if answers.pauses.of(scope) else ""
        note(
            f"no worker that answered has a product named {scope}: {others}{undo}; "
            "--default-product means commands that name none"
        )


def _has_scope(report: "WorkerReport", scope: str | None) -> bool:
    return any(_is_of(state, scope) for state in report.products)


def _is_of(state: "ProductState", scope: str | None) -> bool:
    return scope is None or (state.product or "") == scope


def _pause(order: "Order") -> str:
    from worker.admin.pauses import described

    why = f": {order.reason}" if order.reason else ""
    return printable(f"{described(order.scope)}, since {local_time(order.at)}, by {order.by}{why}")


def _print_workers(answers: "Answers") -> None:
    from worker.admin.pauses import described

    rows = []
    for report in answers.reports:
        for state in report.products:
            condition = "sends"
            if state.is_paused:
                condition = "paused by hand" if state.is_by_hand else "paused by itself"
            due = "" if state.next_try_in_s is None else f"{state.next_try_in_s:g} s"
            why = "" if state.is_by_hand else state.reason
            rows.append((report.worker, described(state.product or ""), condition, due, why))
    print_rows(("worker", "product", "state", "next probe in", "reason"), rows)
