//! The medians as a picture: a point for each cell and VMM on a logarithmic scale, with a line from the best update to
//! the worst.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figures::{Figure, Figures};
use super::plan::{Cell, MODES, Mode, WHO, Who};

/// Pixels; the right part of the width names the colours.
const SIZE: (u32, u32) = (960, 480);
const CHART_WIDTH: u32 = 740;

/// Told apart also by those who do not see colours: by brightness, and a mode by its shape.
fn colour(who: Who) -> RGBColor {
    match who {
        Who::CprVmm => RGBColor(0, 90, 181),
        Who::Qemu => RGBColor(220, 50, 32),
        Who::QemuSmall => RGBColor(230, 159, 0),
    }
}

/// An SVG of the figures of these cells.
pub(super) fn svg(figures: &Figures, cells: &[&'static Cell]) -> Result<String> {
    let mut text = String::new();
    draw(SVGBackend::with_string(&mut text, SIZE).into_drawing_area(), figures, cells)
        .map_err(|error| anyhow!("cannot draw: {error}"))?;
    Ok(text)
}

fn draw(
    area: DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    figures: &Figures,
    cells: &[&'static Cell],
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(CHART_WIDTH);
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let lowest = figures.iter().map(|figure| ms(figure.best())).fold(f64::INFINITY, f64::min);
    let highest = figures.iter().map(|figure| ms(figure.worst())).fold(1.0, f64::max);
    // Whole decades.
    let bottom = 10_f64.powf(lowest.clamp(0.01, 1.0).log10().floor());
    let top = 10_f64.powf(highest.log10().ceil());
    let mut chart = ChartBuilder::on(&left)
        .caption("The guest's pause during a live update", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..cells.len() as f64, (bottom..top).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_label_formatter(&|y| format!("{y}"))
        .y_desc("ms, median; line: best to worst")
        .label_style(("sans-serif", 13))
        .draw()?;
    let centred = ("sans-serif", 13).into_text_style(&left).pos(Pos::new(HPos::Center, VPos::Top));
    for (column, cell) in cells.iter().enumerate() {
        let (x, y) = chart.plotting_area().map_coordinate(&(column as f64 + 0.5, bottom));
        left.draw(&Text::new(cell.to_string(), (x, y + 8), &centred))?;
    }

    let series: Vec<(Mode, Who)> = MODES.into_iter().flat_map(|mode| WHO.map(|who| (mode, who))).collect();
    let mut legend_y = 60;
    for (number, &(mode, who)) in series.iter().enumerate() {
        let style = colour(who);
        let of_series: Vec<&Figure> =
            figures.iter().filter(|figure| figure.mode == mode && figure.who == who).collect();
        if of_series.is_empty() {
            continue;
        }
        let place = |figure: &Figure| {
            let column = cells.iter().position(|cell| *cell == figure.cell).unwrap_or_default();
            column as f64 + (number as f64 + 1.0) / (series.len() as f64 + 1.0)
        };
        chart.draw_series(of_series.iter().map(|figure| {
            let x = place(figure);
            PathElement::new([(x, ms(figure.best())), (x, ms(figure.worst()))], style.stroke_width(2))
        }))?;
        let points = of_series.iter().map(|figure| (place(figure), ms(figure.median())));
        match mode {
            Mode::CprExec => {
                chart.draw_series(points.map(|point| Circle::new(point, 5, style.filled())))?;
                right.draw(&Circle::new((8, legend_y + 6), 5, style.filled()))?;
            }
            Mode::CprTransfer => {
                chart.draw_series(points.map(|point| TriangleMarker::new(point, 7, style.filled())))?;
                right.draw(&TriangleMarker::new((8, legend_y + 6), 7, style.filled()))?;
            }
        }
        let label = format!("{}, {}", who.name(), mode.name());
        right.draw(&Text::new(label, (22, legend_y), ("sans-serif", 13)))?;
        legend_y += 22;
    }
    Ok(area.present()?)
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::{figure, figures};
    use super::*;

    #[test]
    fn a_picture_names_what_it_shows() {
        let all = figures(vec![
            figure("256M", Who::CprVmm, Mode::CprExec, [3000, 5000]),
            figure("1G", Who::Qemu, Mode::CprTransfer, [2000, 2100]),
        ]);
        let cells = ["256M", "1G"].map(|name| Cell::named(name).unwrap());
        let svg = svg(&all, &cells).unwrap();
        for text in ["<svg", "256 MiB, 1 vCPU", "cpr-vmm, cpr-exec", "QEMU, cpr-transfer"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        assert!(!svg.contains("small build"));
    }
}
