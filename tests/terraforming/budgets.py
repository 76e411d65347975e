"""AWS Budgets at the wire: budgets, whom they alarm and their tags, as Terraform asks for them. Spends nothing."""

from __future__ import annotations

import time
from typing import Any

from tests.terraforming.eks import Object, Refusal


class Budgets:
    """The budgets of one account by name, with their tags and a list of (notification, its subscribers)."""

    def __init__(self) -> None:
        self._budgets: dict[str, Object] = {}
        self._tags: dict[str, list[Object]] = {}
        self._alarms: dict[str, list[tuple[Object, list[Object]]]] = {}

    def answer(self, action: str, asked: Object) -> Object:
        """The answer to a request, or `Refusal`."""
        if action == "CreateBudget":
            name = asked["Budget"]["BudgetName"]
            if name in self._budgets:
                raise Refusal(400, "DuplicateRecordException", f"there is a budget {name}")
            self._budgets[name] = _as_kept(asked["Budget"])
            self._tags[name], self._alarms[name] = asked.get("ResourceTags", []), []
            return {}
        if action == "DescribeBudgets":
            return {"Budgets": [*self._budgets.values()]}

        name = asked.get("BudgetName") or asked["ResourceARN"].rpartition("/")[2]
        if name not in self._budgets:
            raise Refusal(400, "NotFoundException", f"there is no budget {name}")
        if action == "CreateNotification":
            self._alarms[name].append((asked["Notification"], asked["Subscribers"]))
            return {}
        if action == "DeleteBudget":
            del self._budgets[name], self._tags[name], self._alarms[name]
            return {}
        answers: dict[str, Any] = {
            "DescribeBudget": lambda: {"Budget": self._budgets[name]},
            "ListTagsForResource": lambda: {"ResourceTags": self._tags[name]},
            "DescribeNotificationsForBudget": lambda: {"Notifications": [alarm for alarm, _ in self._alarms[name]]},
            "DescribeSubscribersForNotification": lambda: {
                "Subscribers": next(who for alarm, who in self._alarms[name] if alarm == asked["Notification"])
            },
        }
        if action not in answers:
            raise Refusal(400, "NotImplemented", f"{action} is not part of these Budgets")
        return answers[action]()  # type: ignore[no-any-return]


def _as_kept(budget: Object) -> Object:
    """With what AWS adds to what was asked for: from this month on, without an end."""
    month = time.time() // 86400 * 86400
    period = {"Start": month, "End": 3706473600} | {key: at for key, at in budget.get("TimePeriod", {}).items() if at}
    return budget | {"TimePeriod": period, "CalculatedSpend": {"ActualSpend": {"Amount": "0", "Unit": "USD"}}}
