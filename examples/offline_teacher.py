"""A teacher that is not in memory: write its top 16 once, train from the disk.

python examples/offline_teacher.py
"""

import tempfile

import torch
from torch import nn

import kdkernels as kd
from kdkernels.teacher_cache import CacheWriter, Manifest, TeacherCache, data_fingerprint

VOCAB, LENGTH, SEQUENCES = 512, 64, 32


class Model(nn.Module):
    """As small as a language model gets: the next token from the last one."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB, bias=False)

    def head(self, ids):
        return kd.LinearHead(self.embed(ids), self.lm_head.weight)


def write(directory, teacher, sequences):
    manifest = Manifest(
        model="teacher",
        tokenizer="none",  # kdkernels.teacher_cache.tokenizer_hash(tokenizer), if there is one
        vocab_size=VOCAB,
        data=data_fingerprint(sequences.tolist()),
        sequences=len(sequences),
        method="top_k",
        k=16,
    )
    with CacheWriter(directory, manifest) as writer, torch.no_grad():
        for index in writer.todo():  # after a kill: what is left
            ids = sequences[index]
            writer.write(index, ids.tolist(), kd.top_k_target(teacher.head(ids), 16))


def main():
    torch.manual_seed(0)
    teacher, student = Model(64), Model(32)
    sequences, directory = torch.randint(VOCAB, (SEQUENCES, LENGTH)), tempfile.mkdtemp()
    write(directory, teacher, sequences)
    cache = TeacherCache(directory, require={"data": data_fingerprint(sequences.tolist())})
    print(f"{cache.bytes / cache.tokens:.1f} bytes per token on disk, {4 * VOCAB} for all logits in fp32")

    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for step in range(40):
        records = [cache[int(i)] for i in torch.randint(len(cache), (8,))]
        ids = torch.stack([record.input_ids for record in records])
        target = kd.SparseTarget.collate([record.target for record in records])
        loss = kd.kl_div(student.head(ids), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 39):
            print(f"step {step}: KL of the 17 outcomes {loss.item():.4f}")


if __name__ == "__main__":
    main()
