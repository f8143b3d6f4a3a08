"""A bare PyTorch loop with PEFT: padded micro-batches, logits everywhere, AdamW, clipping."""

from __future__ import annotations

from common import Gate, labelled, peft_model, read_work, set_threads

work = read_work()
import torch

set_threads(work)
model = peft_model(work)
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=work["rate"], weight_decay=0.0)
gate = Gate()
for batch in work["batches"]:
    gate.begin()
    rows = [work["rows"][row] for row in batch]
    count, total = sum(map(labelled, rows)), 0.0
    for start in range(0, len(rows), work["micro"]):
        part = rows[start : start + work["micro"]]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([ids + [work["pad"]] * (width - len(ids)) for ids, _ in part])
        labels = torch.tensor([answer + [-100] * (width - len(answer)) for _, answer in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(trained, work["clip"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gate.end(total)
