-- Reserving and charging. Rows are locked in the order of the command, from narrow to wide: the widest one is hot.
-- An entry of `reserve` is {"scope_kind", "scope_id", "unit", "amount"} and, for a budget that opens by itself,
-- "period" (total, day, week, month; UTC, by the database's clock), "subject" and "limit".

-- When the window that now lies in began.
CREATE FUNCTION engine_window_v2(p_period text) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT CASE WHEN p_period = 'total' THEN to_timestamp(0)
                ELSE date_trunc(p_period, clock_timestamp(), 'UTC') END
$$;

-- Opens a budget with the limit an operator set for an earlier window, else with the policy's.
CREATE FUNCTION engine_open_budget_v2(p_tenant uuid, p_entry jsonb, p_starts timestamptz) RETURNS void
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    INSERT INTO budgets (tenant_id, scope_kind, scope_id, unit, period, starts_at, subject, limit_amount, pinned)
        SELECT p_tenant, p_entry ->> 'scope_kind', (p_entry ->> 'scope_id')::uuid, p_entry ->> 'unit',
               COALESCE(p_entry ->> 'period', 'total'), p_starts, p_entry ->> 'subject',
               COALESCE(set.limit_amount, (p_entry ->> 'limit')::numeric), set.limit_amount IS NOT NULL
        FROM (SELECT 1) AS one LEFT JOIN LATERAL (
            SELECT limit_amount FROM budgets
            WHERE tenant_id = p_tenant AND scope_kind = p_entry ->> 'scope_kind'
              AND scope_id = (p_entry ->> 'scope_id')::uuid AND unit = p_entry ->> 'unit'
              AND period = COALESCE(p_entry ->> 'period', 'total') AND pinned
            ORDER BY starts_at DESC LIMIT 1) AS set ON true
        ON CONFLICT DO NOTHING
$$;

-- Sets every amount aside, or none. Answers {"reserved": [...]}, the entries with the window they fell in, or a refusal
-- that names the budget which was too small.
CREATE FUNCTION engine_reserve_v2(p_tenant uuid, p_reserve jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_entry  jsonb;
    v_starts timestamptz;
    v_done   jsonb := '[]';
    v_taken  boolean;
BEGIN
    FOR v_entry IN SELECT value FROM jsonb_array_elements(p_reserve) LOOP
        v_starts := engine_window_v2(COALESCE(v_entry ->> 'period', 'total'));
        FOR v_try IN 1..2 LOOP
            UPDATE budgets SET reserved = reserved + (v_entry ->> 'amount')::numeric
                WHERE tenant_id = p_tenant AND scope_kind = v_entry ->> 'scope_kind'
                  AND scope_id = (v_entry ->> 'scope_id')::uuid AND unit = v_entry ->> 'unit'
                  AND period = COALESCE(v_entry ->> 'period', 'total') AND starts_at = v_starts
                  AND spent + reserved + (v_entry ->> 'amount')::numeric <= limit_amount;
            v_taken := FOUND;
            EXIT WHEN v_taken OR v_try = 2 OR v_entry ->> 'limit' IS NULL;
            PERFORM engine_open_budget_v2(p_tenant, v_entry, v_starts);
        END LOOP;
        IF NOT v_taken THEN
            PERFORM engine_release_v2(p_tenant, v_done);
            RETURN engine_unaffordable_v2(p_tenant, v_entry, v_starts);
        END IF;
        v_done := v_done || (v_entry || jsonb_build_object('starts_at', v_starts));
    END LOOP;
    RETURN jsonb_build_object('reserved', v_done);
END
$$;

-- Gives back what an admission had set aside before a later budget refused it; it holds these rows already.
CREATE FUNCTION engine_release_v2(p_tenant uuid, p_reserved jsonb) RETURNS void
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    UPDATE budgets AS b SET reserved = b.reserved - r.amount
        FROM jsonb_to_recordset(p_reserved)
            AS r (scope_kind text, scope_id uuid, unit text, period text, starts_at timestamptz, amount numeric)
        WHERE b.tenant_id = p_tenant AND b.scope_kind = r.scope_kind AND b.scope_id = r.scope_id AND b.unit = r.unit
          AND b.period = COALESCE(r.period, 'total') AND b.starts_at = r.starts_at
$$;

-- How a budget refuses: with its own figures, or by not being there.
CREATE FUNCTION engine_unaffordable_v2(p_tenant uuid, p_entry jsonb, p_starts timestamptz) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_period text := COALESCE(p_entry ->> 'period', 'total');
    v_name   text := CASE WHEN v_period = 'total' THEN p_entry ->> 'scope_kind'
                          ELSE format('%s''s %s', p_entry ->> 'scope_kind', v_period) END;
    v_unit   text := p_entry ->> 'unit';
    v_rule   text := concat_ws('.', CASE WHEN p_entry ? 'limit' THEN 'limits' ELSE 'budgets' END,
        p_entry ->> 'scope_kind', p_entry ->> 'period', p_entry ->> 'unit');
    v_limit  jsonb := jsonb_strip_nulls(jsonb_build_object('scope', p_entry -> 'scope_kind',
        'scope_id', p_entry -> 'scope_id', 'subject', p_entry -> 'subject', 'unit', v_unit, 'period', v_period));
    v_budget budgets;
BEGIN
    SELECT * INTO v_budget FROM budgets
        WHERE tenant_id = p_tenant AND scope_kind = p_entry ->> 'scope_kind'
          AND scope_id = (p_entry ->> 'scope_id')::uuid AND unit = v_unit AND period = v_period AND starts_at = p_starts;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('outcome', 'deny', 'reason', 'budget_missing', 'limit', v_limit, 'rule', v_rule,
            'message', format('no %s budget in %s is set for this %s', v_name, v_unit, p_entry ->> 'scope_kind'),
            'unblock', format('a %s budget in %s', v_name, v_unit));
    END IF;
    v_limit := v_limit || jsonb_build_object('limit', trim_scale(v_budget.limit_amount)::text,
        'spent', trim_scale(v_budget.spent)::text, 'reserved', trim_scale(v_budget.reserved)::text,
        'needed', trim_scale((p_entry ->> 'amount')::numeric)::text);
    IF v_period <> 'total' THEN
        v_limit := v_limit || jsonb_build_object('ends_at',
            (p_starts AT TIME ZONE 'UTC' + ('1 ' || v_period)::interval) AT TIME ZONE 'UTC');
    END IF;
    RETURN jsonb_strip_nulls(jsonb_build_object('outcome', 'deny', 'reason', 'budget_exceeded', 'limit', v_limit,
        'rule', v_rule, 'message', format('the %s budget is too small: limit %s %s, spent %s, reserved %s, needed %s', v_name,
            v_limit ->> 'limit', v_unit, v_limit ->> 'spent', v_limit ->> 'reserved', v_limit ->> 'needed'),
        'unblock', format('a higher %s budget in %s', v_name, v_unit)
            || COALESCE(', or waiting until ' || (v_limit ->> 'ends_at'), '')));
END
$$;

-- Turns the reservations of a grant into spend: `p_charges` maps units to amounts; a unit left out is charged as
-- reserved. Answers whether any charge was more than its reservation. The same order of locks as reserving.
CREATE FUNCTION engine_charge_v2(p_tenant uuid, p_grant uuid, p_charges jsonb) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_each    record;
    v_overrun boolean := false;
BEGIN
    FOR v_each IN
        SELECT r.scope_kind, r.scope_id, r.unit, r.period, r.starts_at, r.amount,
               COALESCE((p_charges ->> r.unit)::numeric, r.amount) AS actual
        FROM reservations AS r WHERE r.tenant_id = p_tenant AND r.grant_id = p_grant ORDER BY r.position
    LOOP
        UPDATE budgets SET reserved = reserved - v_each.amount, spent = spent + v_each.actual
            WHERE tenant_id = p_tenant AND scope_kind = v_each.scope_kind AND scope_id = v_each.scope_id
              AND unit = v_each.unit AND period = v_each.period AND starts_at = v_each.starts_at;
        v_overrun := v_overrun OR v_each.actual > v_each.amount;
    END LOOP;
    UPDATE reservations SET settled = COALESCE((p_charges ->> unit)::numeric, amount)
        WHERE tenant_id = p_tenant AND grant_id = p_grant;
    RETURN v_overrun;
END
$$;
