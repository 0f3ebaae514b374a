"""LotteryTicket, its rounds, and the moment to which they return."""

from lightning_sparse.methods.lottery_ticket.lottery_ticket import LotteryTicket

__all__ = ["LotteryTicket"]
