// Statistics of the CPU's kernels as Python objects.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/statistics.h"
#include "cpu/wait.h"

namespace ep {

inline std::vector<uint64_t> read_words(const uint64_t* words, size_t count) {
  std::vector<uint64_t> values;
  for (size_t i = 0; i < count; ++i) values.push_back(cpu::ld_relaxed(words + i));
  return values;
}

inline std::vector<std::vector<uint64_t>> read_rows(const std::vector<uint64_t>& words,
                                                    size_t num_columns) {
  std::vector<std::vector<uint64_t>> rows;
  for (size_t first = 0; first < words.size(); first += num_columns) {
    rows.push_back(read_words(&words[first], num_columns));
  }
  return rows;
}

inline pybind11::dict statistics_dict(const cpu::Statistics& statistics) {
  pybind11::list ops;
  for (const cpu::OpCounters& op : statistics.ops()) {
    pybind11::dict counters;
    counters["num_ops"] = cpu::ld_relaxed(&op.num_ops);
    counters["num_rows"] = cpu::ld_relaxed(&op.num_rows);
    counters["total_ns"] = cpu::ld_relaxed(&op.total_ns);
    counters["wait_ns"] = cpu::ld_relaxed(&op.wait_ns);
    counters["num_in_bucket"] = read_words(op.num_in_bucket, cpu::kNumBuckets);
    ops.append(counters);
  }
  pybind11::dict result;
  result["ops"] = ops;
  result["wait_ns"] = read_rows(statistics.wait_ns(), statistics.num_ranks());
  result["sent_bytes"] = read_rows(statistics.sent_bytes(), statistics.num_ranks());
  const std::vector<uint64_t>& expert_rows = statistics.num_expert_rows();
  result["num_expert_rows"] = read_words(expert_rows.data(), expert_rows.size());
  return result;
}

// Nanoseconds that counting adds to an operation among `num_ranks` ranks on this machine.
inline double counting_ns(uint32_t num_ranks, uint32_t num_local_experts, uint64_t num_ops) {
  cpu::Statistics statistics(1, num_ranks, num_local_experts);
  const uint64_t begin_ns = cpu::now_ns();
  for (uint64_t op = 0; op < num_ops; ++op) {
    for (uint32_t rank = 0; rank < num_ranks; ++rank) {
      statistics.add_wait(0, rank, op);
      statistics.add_sent(0, rank, op);
    }
    for (uint32_t e = 0; e < num_local_experts; ++e) statistics.add_expert_rows(e, op);
    statistics.add_op(0, op, op, op);
  }
  return static_cast<double>(cpu::now_ns() - begin_ns) / static_cast<double>(num_ops);
}

inline void bind_statistics(pybind11::module_& m) {
  std::vector<uint64_t> limits;
  for (uint32_t i = 0; i < cpu::kNumBoundedBuckets; ++i) limits.push_back(cpu::bucket_limit_ns(i));
  m.attr("BUCKET_LIMITS_NS") = pybind11::tuple(pybind11::cast(limits));
  m.def("bucket_of", &cpu::bucket_of);
  m.def("counting_ns", &counting_ns);
}

}  // namespace ep
