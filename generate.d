generate.o: commands/generate.cpp base/files.h common.h base/json.h \
 base/progress.h base/text.h commands/commands.h commands/device.h \
 runtime/models.h cpu/backend.h cpu/device.h base/threads.h ops.h \
 cpu/rows.h cpu/simd.h model.h config.h base/arena.h ranks/collectives.h \
 ranks/ranks.h ranks/sockets.h ranks/world.h ranks/shards.h \
 model_backward.h model_stream.h gca_kernels.cuh runtime/stream.h \
 runtime/chunk_memory.h commands/shared.h base/flags.h runtime/decode.h \
 runtime/memory_file.h base/safetensors.h runtime/run.h \
 runtime/checkpoint.h runtime/settings.h runtime/needles.h dataloader.h \
 tokenizer/tokenizer.h tokenizer/pretokens.h tokenizer/text_files.h
base/files.h:
common.h:
base/json.h:
base/progress.h:
base/text.h:
commands/commands.h:
commands/device.h:
runtime/models.h:
cpu/backend.h:
cpu/device.h:
base/threads.h:
ops.h:
cpu/rows.h:
cpu/simd.h:
model.h:
config.h:
base/arena.h:
ranks/collectives.h:
ranks/ranks.h:
ranks/sockets.h:
ranks/world.h:
ranks/shards.h:
model_backward.h:
model_stream.h:
gca_kernels.cuh:
runtime/stream.h:
runtime/chunk_memory.h:
commands/shared.h:
base/flags.h:
runtime/decode.h:
runtime/memory_file.h:
base/safetensors.h:
runtime/run.h:
runtime/checkpoint.h:
runtime/settings.h:
runtime/needles.h:
dataloader.h:
tokenizer/tokenizer.h:
tokenizer/pretokens.h:
tokenizer/text_files.h:
