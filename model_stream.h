// What a DRT's rows leave behind for their later slots when they are read a segment or a slot at a time, and the pass
// of one slot a row, which decoding makes: the bodies of what model.h declares, which includes this at its end.
#pragma once
#include "model.h"

namespace gca {

template <class Device>
void DRT<Device>::open(StreamState& stream, int64_t B, int64_t chunks, bool with_kv) {
  plan(stream, B, chunks, with_kv);
  stream.arena.commit(device);
  rewind(stream);
}
template <class Device>
void DRT<Device>::plan(StreamState& stream, int64_t B, int64_t chunks, bool with_kv) {
  const int64_t D = config.width;
  stream.B = B;
  stream.reach = reach;
  stream.capacity = chunks;
  stream.rings.assign(config.lower + config.upper(), nullptr);
  stream.pick.assign(config.groups.size(), nullptr);
  stream.w.assign(config.groups.size(), nullptr);
  for (act*& ring : stream.rings) stream.arena.want(ring, "window", B * reach.window * 2 * D);
  for (int32_t*& pick : stream.pick) stream.arena.want(pick, "picks", B * reach.topk);
  for (stat*& w : stream.w) stream.arena.want(w, "weights", B * reach.topk);
  stream.arena.want(stream.rows, "places of slots", B);
  if (!config.groups.empty()) {
    if (with_kv) stream.arena.want(stream.kv, "chunk memory", B * chunks * config.chunk * 2 * D);
    stream.arena.want(stream.landmarks, "landmarks", B * chunks * D);
    stream.arena.want(stream.unfinished_chunk, "unfinished chunk", B * config.chunk * D);
  }
}
template <class Device>
void DRT<Device>::rewind(StreamState& stream) {
  stream.slots = 0;
  for (size_t g = 0; g < stream.pick.size(); g++)
    device.no_pick(stream.pick[g], stream.w[g], stream.B, 0, static_cast<int>(reach.topk));
}
template <class Device>
typename DRT<Device>::Place DRT<Device>::place_in(StreamState& stream) const {
  const int64_t D = config.width;
  return {.first_slot = stream.slots,
          .capacity = stream.capacity,
          .rings = stream.rings,
          .landmarks = stream.landmarks,
          .landmark_stride = D,
          .landmark_row_stride = stream.capacity * D,
          .kept_kv = stream.kv,
          .kept_landmarks = stream.landmarks,
          .unfinished_chunk = stream.unfinished_chunk,
          .last_picks = &stream,
          .kv = stream.kv,
          .kv_chunks = stream.capacity,
          .picks = {}};
}
template <class Device>
typename DRT<Device>::Row DRT<Device>::slot_row(const StreamState& stream, int64_t b) const {
  const int64_t D = config.width, K = stream.reach.topk;
  const auto apart = [](const auto& parts) { return parts.size() > 1 ? parts[1] - parts[0] : 0; };
  Row row{};
  row.slot = stream.slots;
  row.ring = stream.rings[0] + b * stream.reach.window * 2 * D;
  row.ring_stride = apart(stream.rings);
  if (groups.empty()) return row;
  row.unfinished_chunk = stream.unfinished_chunk + b * config.chunk * D;
  if (stream.kv) row.kv = stream.kv + b * stream.capacity * config.chunk * 2 * D;
  row.pick = stream.pick[0] + b * K;
  row.pick_stride = apart(stream.pick);
  row.w = stream.w[0] + b * K;
  row.w_stride = apart(stream.w);
  return row;
}
template <class Device>
SlotShape DRT<Device>::slot_shape() const {
  return {pass_.in.B,
          static_cast<int>(config.heads),
          static_cast<int>(config.head_size()),
          static_cast<int>(config.chunk),
          static_cast<int>(reach.topk),
          reach.window,
          config.null_slot};
}
template <class Device>
void DRT<Device>::read_slots(Row* rows, int64_t B) {
  GCA_CHECK(B <= max_rows_, "planned for ", max_rows_, " slots, found ", B);
  Pass pass{{B, 1, {}, nullptr}, {}, nullptr, rows};
  pass.place.rings.resize(config.lower + config.upper());
  lower_part(pass);
  for (size_t g = 0; g < groups.size(); g++) group_part(pass, g);
}
template <class Device>
void DRT<Device>::close_chunks(StreamState& stream, int64_t first, const Selection& selection) {
  if (groups.empty()) return;
  const int64_t S = config.chunk, D = config.width;
  GCA_CHECK(stream.slots % S == 0 && stream.slots / S <= stream.capacity, "slot ", stream.slots, " of a stream of ",
            stream.capacity, " chunks ends no chunk that it holds");
  pass_ = {{stream.B, 1, selection, &stream}, place_in(stream), nullptr};
  pass_.place.first_slot--;  // the landmark's
  encode_chunks(stream.unfinished_chunk);
  // What entered each group is still where the layers before it have left it.
  const act* x = lower.empty() ? embedded : lower.back().out;
  for (Group& group : groups) {
    retrieve(group, x + first * D);
    x = group.layers.back().out;
  }
}

}  // namespace gca
