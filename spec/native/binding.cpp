// Python face of the native drafters. Arrays are read in place and calls run without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "history.h"
#include "reader.h"

namespace py = pybind11;
using paceline::DraftRule;
using paceline::History;
using paceline::Reader;
using paceline::Token;
using paceline::TokenView;

namespace {

template <class Number>
using Array = py::array_t<Number, py::array::c_style>;
using TokenArray = Array<Token>;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class Number>
void check_one_dimensional(const Array<Number>& array, const char* what) {
  if (array.ndim() != 1) {
    throw std::invalid_argument(std::string(what) + " must be one-dimensional, got " +
                                std::to_string(array.ndim()) + " dimensions");
  }
}

TokenView view(const TokenArray& tokens) {
  check_one_dimensional(tokens, "tokens");
  return {tokens.data(), static_cast<std::size_t>(tokens.size())};
}

TokenArray as_array(const std::vector<Token>& tokens) {
  return TokenArray(static_cast<py::ssize_t>(tokens.size()), tokens.data());
}

py::list sequences(History& history, const std::string& problem, std::int64_t generation) {
  std::vector<std::vector<Token>> read;
  {
    const py::gil_scoped_release no_gil;
    read = history.sequences(problem, generation);
  }
  py::list result;
  for (const std::vector<Token>& tokens : read) result.append(as_array(tokens));
  return result;
}

py::list summaries(History& history) {
  std::vector<History::Summary> read;
  {
    const py::gil_scoped_release no_gil;
    read = history.summaries();
  }
  py::list result;
  for (const History::Summary& each : read) {
    result.append(py::make_tuple(each.problem, each.generation, each.num_tokens, each.num_states,
                                 each.memory_bytes));
  }
  return result;
}

py::tuple propose(Reader& reader, const Array<std::int64_t>& requests, const TokenArray& tokens,
                  const Array<std::int32_t>& num_tokens, const Array<std::int32_t>& max_draft,
                  double min_probability) {
  check_one_dimensional(requests, "requests");
  check_one_dimensional(num_tokens, "num_tokens");
  check_one_dimensional(max_draft, "max_draft");
  const py::ssize_t size = requests.size();
  if (num_tokens.size() != size || max_draft.size() != size) {
    throw std::invalid_argument("requests, num_tokens and max_draft must be equally long, got " +
                                std::to_string(size) + ", " + std::to_string(num_tokens.size()) +
                                " and " + std::to_string(max_draft.size()));
  }
  std::int32_t width = 0;
  for (py::ssize_t row = 0; row < size; ++row) width = std::max(width, max_draft.data()[row]);
  TokenArray drafted({size, static_cast<py::ssize_t>(width)});
  Array<float> probabilities({size, static_cast<py::ssize_t>(width)});
  Array<std::int32_t> num_drafted(size);
  Array<std::int32_t> matches(size);
  Array<std::int64_t> generations(size);
  std::fill_n(drafted.mutable_data(), drafted.size(), -1);
  std::fill_n(probabilities.mutable_data(), probabilities.size(), 0.0F);
  const paceline::DraftBatch batch{requests.data(), static_cast<std::size_t>(size), view(tokens),
                                   num_tokens.data(), max_draft.data()};
  const paceline::Drafts drafts{static_cast<std::size_t>(width), drafted.mutable_data(),
                                probabilities.mutable_data(), num_drafted.mutable_data(),
                                matches.mutable_data(), generations.mutable_data()};
  {
    const py::gil_scoped_release no_gil;
    reader.propose(batch, min_probability, drafts);
  }
  return py::make_tuple(drafted, probabilities, num_drafted, matches, generations);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native drafters of paceline.spec.";

  py::class_<History, std::shared_ptr<History>>(module, "History")
      .def(py::init<std::size_t, std::size_t>(), py::arg("window"), py::arg("max_bytes"))
      .def(
          "add",
          [](History& self, const std::string& problem, std::int64_t generation,
             const TokenArray& tokens) { self.add(problem, generation, view(tokens)); },
          py::arg("problem"), py::arg("generation"), py::arg("tokens").noconvert(), NoGil())
      .def(
          "extend",
          [](History& self, const std::string& problem, std::int64_t generation,
             const std::string& sequence, const TokenArray& tokens) {
            self.extend(problem, generation, sequence, view(tokens));
          },
          py::arg("problem"), py::arg("generation"), py::arg("sequence"),
          py::arg("tokens").noconvert(), NoGil())
      .def("end_sequence", &History::end_sequence, py::arg("problem"), py::arg("generation"),
           py::arg("sequence"), NoGil())
      .def("forget", &History::forget, py::arg("before"), NoGil())
      .def("sequences", &sequences, py::arg("problem"), py::arg("generation"))
      .def("summaries", &summaries)
      .def_property_readonly("num_problems", py::cpp_function(&History::num_problems, NoGil()))
      .def_property_readonly("num_tokens", &History::num_tokens)
      .def_property_readonly("num_refused_tokens", &History::num_refused_tokens)
      .def_property_readonly("num_dropped_generations", &History::num_dropped_generations)
      .def_property_readonly("memory_bytes", &History::memory_bytes);

  py::class_<Reader>(module, "Reader")
      .def(py::init([](std::shared_ptr<History> history, std::uint32_t min_match,
                       std::uint32_t max_match, double decay) {
             return std::make_unique<Reader>(std::move(history),
                                             DraftRule{min_match, max_match, decay});
           }),
           py::arg("history"), py::arg("min_match"), py::arg("max_match"), py::arg("decay"))
      .def("open", &Reader::open, py::arg("problem"), py::arg("seed"),
           py::arg("position"), NoGil())
      .def("close", &Reader::close, py::arg("request"), NoGil())
      .def("propose", &propose, py::arg("requests").noconvert(), py::arg("tokens").noconvert(),
           py::arg("num_tokens").noconvert(), py::arg("max_draft").noconvert(),
           py::arg("min_probability"))
      .def_property_readonly("num_requests", &Reader::num_requests);
}
